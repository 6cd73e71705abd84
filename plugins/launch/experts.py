"""The plans of ExpertRoute and RoutedExperts (see ``plugins/launch/plans.py``; standard library only)."""

from __future__ import annotations

from bilevel import contract
from bilevel.plugins.launch.launches import Buffer, Builder, Geometry, Launch, LaunchPlan
from bilevel.plugins.launch.tiles import grouped_tile, power_of_two, small_tile, vector_tile

_CHUNK = 512  # pairs that one program of the counting sort takes
_SLICE = 1024  # outputs of a token that one program of expert_sum adds up


def plan_expert_route(g: Geometry, dtype: str, arch: int) -> tuple[LaunchPlan, ...]:
    experts, groups, top_k = g["E"], g["Gp"], g["top_k"]
    constants = {
        "E": experts,
        "GROUPS": groups,
        "TOP_K": top_k,
        "TOP_GROUPS": g["topk_group"],
        "FUNC": contract.SCORE_FUNCS.index(g["score_func"]),
        "SCORE": ("max", "top2_sum", "external").index(g["group_score"]),
        "NORMALIZE": g["normalize"],
        "ZERO_FILL": g["zero_fill"],
        "GP": power_of_two(groups),
        "SP": power_of_two(experts // groups),
        "KP": power_of_two(top_k),
    }
    launch = Builder(contract.EXPERT_ROUTE, dtype).launch(
        "experts.expert_route_rows",
        "logits group_logits select_bias ids weights scale norm_floor",
        constants,
        ("T", "1", "1"),
        small_tile(1),
    )
    return (LaunchPlan("rows", "", (), (launch,)),)


def plan_routed_experts(g: Geometry, dtype: str, arch: int) -> tuple[LaunchPlan, ...]:
    few_each = f"T * {g['k']} <= {32 * g['E']}"
    return (
        _pairs(g, dtype),
        _tiles("small tiles", few_each, 16, g, dtype, arch),
        _tiles("tiles", "", 64, g, dtype, arch),
    )


def _pairs(g: Geometry, dtype: str) -> LaunchPlan:
    """Few tokens: every (token, expert) pair reads its expert's weights."""
    width, inner, top_k = g["d"], g["f"], g["k"]
    buffers = (Buffer("hidden", dtype, f"T * {top_k * inner}"),)
    make = Builder(contract.ROUTED_EXPERTS, dtype, buffers)
    sizes = {"E": g["E"], "WIDTH": width, "INNER": inner, "TOP_K": top_k}
    up, down = vector_tile(width), vector_tile(inner)
    hidden = make.launch(
        "experts.pair_hidden",
        "x ids gate_up hidden gate_scale limit up_shift",
        {**sizes, "COLS": up.cols, "DEPTH": up.depth},
        (str(-(-inner // up.cols)), f"T * {top_k}", "1"),
        up,
    )
    output = make.launch(
        "experts.pair_output",
        "ids weights down hidden out",
        {**sizes, "COLS": down.cols, "DEPTH": down.depth},
        (str(-(-width // down.cols)), "T", "1"),
        down,
    )
    return LaunchPlan("pairs", "T <= 8", buffers, (hidden, output))


def _tiles(name: str, when: str, rows: int, g: Geometry, dtype: str, arch: int) -> LaunchPlan:
    """A counting sort of the pairs by expert, tiles of ``rows`` pairs of one expert, and the weighted sum back."""
    experts, width, inner, top_k = g["E"], g["d"], g["f"], g["k"]
    pairs = f"T * {top_k}"
    chunks = f"ceil_div({pairs}, {_CHUNK})"
    buffers = (
        Buffer("counts", "int32", f"{chunks} * {experts}"),
        Buffer("places", "int32", f"{chunks} * {experts}"),
        Buffer("experts", "int32", str(3 * experts)),
        Buffer("order", "int32", pairs),
        Buffer("hidden", dtype, f"{pairs} * {inner}"),
        Buffer("products", dtype, f"{pairs} * {width}"),
    )
    make = Builder(contract.ROUTED_EXPERTS, dtype, buffers, pairs=pairs, chunks=chunks)
    tiles = f"min({pairs}, ceil_div({pairs}, {rows}) + {experts})"
    up, down = grouped_tile(width, 2, rows, dtype, arch), grouped_tile(inner, 1, rows, dtype, arch)
    sizes = {"E": experts, "EP": power_of_two(experts), "WIDTH": width, "INNER": inner, "ROWS": rows}
    hidden = make.launch(
        "grouped.tile_hidden",
        "x gate_up experts order hidden gate_scale limit up_shift",
        {**sizes, "TOP_K": top_k, "COLS": up.cols, "DEPTH": up.depth},
        (tiles, str(-(-inner // up.cols)), "1"),
        up,
    )
    output = make.launch(
        "grouped.tile_output",
        "down experts order hidden products",
        {**sizes, "COLS": down.cols, "DEPTH": down.depth},
        (tiles, str(-(-width // down.cols)), "1"),
        down,
    )
    cols = min(_SLICE, power_of_two(width))
    total = make.launch(
        "grouped.expert_sum",
        "ids weights products out",
        {"E": experts, "WIDTH": width, "TOP_K": top_k, "COLS": cols},
        ("T", str(-(-width // cols)), "1"),
        small_tile(4),
    )
    return LaunchPlan(name, when, buffers, (*_sort(make, experts, rows, chunks), hidden, output, total))


def _sort(make: Builder, experts: int, rows: int, chunks: str) -> tuple[Launch, Launch, Launch]:
    """The counting sort of the pairs."""
    padded = max(128, power_of_two(experts))  # no fewer elements than threads, so that sums over experts need no copies
    count = make.launch(
        "grouped.expert_count",
        "ids counts pairs",
        {"E": experts, "EP": padded, "CHUNK": _CHUNK, "COLS": min(64, 8192 // padded)},
        (chunks, "1", "1"),
        small_tile(4),
    )
    offsets = make.launch(
        "grouped.expert_offsets",
        "counts places experts chunks",
        {"E": experts, "EP": padded, "ROWS": rows},
        ("1", "1", "1"),
        small_tile(4),
    )
    order = make.launch(
        "grouped.expert_order",
        "ids places order pairs",
        {"E": experts, "CHUNK": _CHUNK, "COLS": 64},
        (chunks, "1", "1"),
        small_tile(4),
    )
    return count, offsets, order
