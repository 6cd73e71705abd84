"""The plans of ExpertRoute and RoutedExperts (see ``plugins/plans.py``; standard library only)."""

from __future__ import annotations

from bilevel.plugins import contract
from bilevel.plugins.launches import Buffer, Builder, Geometry, Plan
from bilevel.plugins.tiles import grouped_tile, power_of_two, vector_tile

_CHUNK = 512  # pairs that one program of the counting sort takes
_SLICE = 1024  # outputs of a token that one program of expert_sum adds up


def expert_route(g: Geometry, dtype: str, arch: int) -> tuple[Plan, ...]:
    experts, groups, top_k = g["E"], g["Gp"], g["top_k"]
    constants = {
        "E": experts,
        "GROUPS": groups,
        "TOP_K": top_k,
        "TOP_GROUPS": g["topk_group"],
        "SIGMOID": int(g["score_func"] == "sigmoid"),
        "SCORE": ("max", "top2_sum", "external").index(g["group_score"]),
        "NORMALIZE": g["normalize"],
        "GP": power_of_two(groups),
        "SP": power_of_two(experts // groups),
        "KP": power_of_two(top_k),
    }
    names = "logits group_logits select_bias ids weights scale"
    kernel = "triton_experts.expert_route_rows"
    launch = Builder(contract.EXPERT_ROUTE, dtype).launch(kernel, names, constants, ("T", "1", "1"), warps=1)
    return (Plan("rows", "", (), (launch,)),)


def routed_experts(g: Geometry, dtype: str, arch: int) -> tuple[Plan, ...]:
    return (
        _experts_pairs(g, dtype),
        # Few pairs an expert: small tiles waste less.
        _experts_tiles("small tiles", f"T * {g['k']} <= {32 * g['E']}", 16, g, dtype, arch),
        _experts_tiles("tiles", "", 64, g, dtype, arch),
    )


def _experts_pairs(g: Geometry, dtype: str) -> Plan:
    width, inner, top_k = g["d"], g["f"], g["k"]
    buffers = (Buffer("hidden", dtype, f"T * {top_k * inner}"),)
    make = Builder(contract.ROUTED_EXPERTS, dtype, buffers)
    sizes = {"E": g["E"], "WIDTH": width, "INNER": inner, "TOP_K": top_k}
    up, down = vector_tile(width), vector_tile(inner)
    hidden = make.launch(
        "triton_experts.pair_hidden",
        "x ids gate_up hidden",
        {**sizes, "COLS": up.cols, "DEPTH": up.depth},
        (str(-(-inner // up.cols)), f"T * {top_k}", "1"),
        up.warps,
        up.stages,
    )
    output = make.launch(
        "triton_experts.pair_output",
        "ids weights down hidden out",
        {**sizes, "COLS": down.cols, "DEPTH": down.depth},
        (str(-(-width // down.cols)), "T", "1"),
        down.warps,
        down.stages,
    )
    return Plan("pairs", "T <= 8", buffers, (hidden, output))


def _experts_tiles(name: str, when: str, rows: int, g: Geometry, dtype: str, arch: int) -> Plan:
    """A counting sort of the pairs by expert, tiles of ``rows`` pairs of one expert, and the weighted sum back."""
    experts, width, inner, top_k = g["E"], g["d"], g["f"], g["k"]
    pairs, padded = f"T * {top_k}", power_of_two(experts)
    chunks = f"ceil_div({pairs}, {_CHUNK})"
    buffers = (
        Buffer("counts", "int32", f"{chunks} * {experts}"),
        Buffer("experts", "int32", str(3 * experts)),
        Buffer("order", "int32", pairs),
        Buffer("hidden", dtype, f"{pairs} * {inner}"),
        Buffer("products", dtype, f"{pairs} * {width}"),
    )
    make = Builder(contract.ROUTED_EXPERTS, dtype, buffers, pairs=pairs, chunks=chunks)
    few = {"E": experts, "EP": padded}
    sizes = {**few, "WIDTH": width, "INNER": inner, "ROWS": rows}
    tiles = f"min({pairs}, ceil_div({pairs}, {rows}) + {experts})"
    up, down = grouped_tile(width, 2, rows, dtype, arch), grouped_tile(inner, 1, rows, dtype, arch)
    compare = min(64, max(1, 8192 // padded))
    cols = min(_SLICE, power_of_two(width))
    module = "triton_grouped"
    launches = (
        make.launch(
            f"{module}.expert_count", "ids counts pairs", {**few, "CHUNK": _CHUNK, "COLS": compare}, (chunks, "1", "1")
        ),
        make.launch(f"{module}.expert_offsets", "counts experts chunks", {**few, "ROWS": rows}, ("1", "1", "1")),
        make.launch(
            f"{module}.expert_order",
            "ids counts order pairs",
            {"E": experts, "CHUNK": _CHUNK, "COLS": 64},
            (chunks, "1", "1"),
        ),
        make.launch(
            f"{module}.tile_hidden",
            "x gate_up experts order hidden",
            {**sizes, "TOP_K": top_k, "COLS": up.cols, "DEPTH": up.depth},
            (tiles, str(-(-inner // up.cols)), "1"),
            up.warps,
            up.stages,
        ),
        make.launch(
            f"{module}.tile_output",
            "down experts order hidden products",
            {**sizes, "COLS": down.cols, "DEPTH": down.depth},
            (tiles, str(-(-width // down.cols)), "1"),
            down.warps,
            down.stages,
        ),
        make.launch(
            f"{module}.expert_sum",
            "ids weights products out",
            {"E": experts, "WIDTH": width, "TOP_K": top_k, "COLS": cols},
            ("T", str(-(-width // cols)), "1"),
        ),
    )
    return Plan(name, when, buffers, launches)
