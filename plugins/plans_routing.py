"""The plans of CoarseRoute, FineRoute and RoutedAttention (see ``plugins/plans.py``; standard library only)."""

from __future__ import annotations

from bilevel.plugins import contract
from bilevel.plugins.errors import ContractError
from bilevel.plugins.launches import Buffer, Builder, Geometry, Plan
from bilevel.plugins.tiles import attention_tile, decode_tile, power_of_two, route_tile, row_tile

MAX_GROUP = 64  # query heads that share a key/value head and a choice: they fill the rows of a tile
_UNITS = 256  # blocks that one program of coarse_route_split scores


def _route_constants(g: Geometry) -> dict[str, int]:
    """What the kernels of both routing operators share."""
    heads, key_heads, choices = g["Hr"], g["Hk"], g["num_selection_heads"]
    read = key_heads // choices if key_heads % choices == 0 else 1 if choices % key_heads == 0 else heads // choices
    names = {"K": "topk", "BLOCK": "block_size", "INIT": "init_blocks", "LOCAL": "local_blocks", "CAUSAL": "causal"}
    constants = {"HR": heads, "HK": key_heads, "HS": choices, "DR": g["Dr"], **{key: g[name] for key, name in names.items()}}
    return {**constants, "KEY_HEADS": read, "SUMMED": heads // choices // read, "KP": power_of_two(g["topk"])}


def coarse_route(g: Geometry, dtype: str, arch: int) -> tuple[Plan, ...]:
    constants, choices, topk = _route_constants(g), g["num_selection_heads"], g["topk"]
    splits = f"ceil_div(U, {_UNITS})"
    ranks = Buffer("ranks", "int64", f"B * {choices} * L * {splits} * {topk}")
    make = Builder(contract.COARSE_ROUTE, dtype, (ranks,), splits=splits)
    row = row_tile(g["Dr"])
    few = (
        make.launch(
            "triton_routes.coarse_route_split",
            "query unit_key past_len new_len ranks length units splits",
            {**constants, "UNITS": _UNITS, "COLS": row.cols, "DEPTH": row.depth},
            (splits, str(choices), "B * L"),
            row.warps,
            row.stages,
        ),
        make.launch(
            "triton_routes.coarse_route_merge",
            "ranks routes length splits",
            {"HS": choices, "K": topk, "COLS": 128, "KP": constants["KP"]},
            ("L", str(choices), "B"),
            warps=1,
        ),
    )
    tile = route_tile(g["Dr"], topk, dtype, arch)
    shape = {"ROWS": tile.rows, "COLS": tile.cols, "DEPTH": tile.depth}
    many = make.launch(
        "triton_routes.coarse_route_tiles",
        "query unit_key past_len new_len routes length units",
        {**constants, **shape, "SUM_FIRST": int(dtype == "float32" and constants["SUMMED"] > 1)},
        (f"ceil_div(L, {tile.rows})", str(choices), "B"),
        tile.warps,
        tile.stages,
    )
    return Plan("split", "L <= 8", (ranks,), few), Plan("tiles", "", (), (many,))


def fine_route(g: Geometry, dtype: str, arch: int) -> tuple[Plan, ...]:
    constants, choices, topk = _route_constants(g), g["num_selection_heads"], g["topk"]
    row = row_tile(g["Dr"])
    forced = min(g["local_blocks"], topk) + min(g["init_blocks"], topk)
    own = {"HC": g["Hc"], "K1": g["K1"], "COLS": row.cols, "DEPTH": row.depth, "FP": power_of_two(forced)}
    launch = Builder(contract.FINE_ROUTE, dtype).launch(
        "triton_routes.fine_route_rows",
        "query unit_key candidates past_len new_len routes length units",
        {**constants, **own},
        ("L", str(choices), "B"),
        row.warps,
        row.stages,
    )
    return (Plan("rows", "", (), (launch,)),)


def _groups(g: Geometry) -> int:
    """Groups of query heads that share a key/value head and a choice; where heads do not nest, every head is one."""
    heads, kv_heads, choices = g["Hq"], g["Hkv"], g["Hs"]
    groups = choices if choices % kv_heads == 0 else kv_heads if kv_heads % choices == 0 else heads
    if heads // groups > MAX_GROUP:
        raise ContractError(f"RoutedAttention: the kernels take up to {MAX_GROUP} query heads a group, not {heads // groups}")
    return int(groups)


def _attention_constants(g: Geometry, cols: int, depth: int) -> dict[str, int]:
    names = {"HQ": "Hq", "HKV": "Hkv", "HS": "Hs", "D": "D", "BLOCK": "block_size", "CAUSAL": "causal"}
    per_block = min(cols, power_of_two(g["block_size"]))
    return {**{key: g[name] for key, name in names.items()}, "GROUPS": _groups(g), "COLS": cols, "PER_BLOCK": per_block, "DP": depth}


def routed_attention(g: Geometry, dtype: str, arch: int) -> tuple[Plan, ...]:
    return _attention_split(g, dtype, arch), _attention_tiles(g, dtype, arch)


def _attention_tiles(g: Geometry, dtype: str, arch: int) -> Plan:
    groups, topk = _groups(g), g["K"]
    tile = attention_tile(g["D"], g["Hq"] // groups, g["block_size"], dtype, arch)
    tokens = tile.rows // (g["Hq"] // groups)
    tiles = f"ceil_div(L, {tokens})"
    # A tile lists no more blocks than its positions have slots, and no more than there are.
    slots = f"(1 + min({tokens * topk}, floor_div(M, {g['block_size']})))"
    count = f"B * {g['Hs']} * {tiles} * {slots}"
    buffers = (Buffer("blocks", "int32", count), Buffer("bits", "int32" if tokens <= 32 else "int64", count))
    make = Builder(contract.ROUTED_ATTENTION, dtype, buffers, slots=slots)
    names = {"HS": "Hs", "K": "K", "BLOCK": "block_size", "CAUSAL": "causal"}
    padded = {"TOKENS": tokens, "TOKENS_P": power_of_two(tokens), "KP": power_of_two(topk)}
    plan = make.launch(
        "triton_attention.attention_plan",
        "routes past_len new_len blocks bits length capacity slots",
        {**{key: g[name] for key, name in names.items()}, **padded},
        (tiles, str(g["Hs"]), "B"),
    )
    attend = make.launch(
        "triton_attention.attention_tiles",
        "q k v past_len new_len blocks bits out length capacity slots scale",
        {**_attention_constants(g, tile.cols, tile.depth), "TOKENS": tokens, "ROWS": tile.rows},
        (tiles, str(groups), "B"),
        tile.warps,
        tile.stages,
    )
    return Plan("tiles", "", buffers, (plan, attend))


def _attention_split(g: Geometry, dtype: str, arch: int) -> Plan:
    groups, heads, topk = _groups(g), g["Hq"], g["K"]
    tile = decode_tile(g["D"], heads // groups, g["block_size"], dtype, arch)
    # Enough tokens for a program to be worth its partial result, few enough to fill a GPU with one row.
    split = max(1, 64 // g["block_size"])
    splits = -(-topk // split)
    buffers = (
        Buffer("partial", "float32", f"B * L * {heads * splits * g['D']}"),
        Buffer("statistics", "float32", f"B * L * {heads * splits * 2}"),
    )
    make = Builder(contract.ROUTED_ATTENTION, dtype, buffers)
    constants = {**_attention_constants(g, tile.cols, tile.depth), "K": topk, "KP": power_of_two(topk), "SPLITS": splits}
    attend = make.launch(
        "triton_decode.attention_split",
        "q k v routes past_len new_len partial statistics length capacity scale",
        {**constants, "SPLIT": split, "ROWS": tile.rows},
        (str(splits), str(groups), "B * L"),
        tile.warps,
        tile.stages,
    )
    shared = {key: constants[key] for key in ("HQ", "HS", "D", "K", "BLOCK", "CAUSAL", "SPLITS", "DP", "KP")}
    merge = make.launch(
        "triton_decode.attention_merge",
        "routes past_len new_len partial statistics out length capacity",
        {**shared, "COLS": 16, "SP": power_of_two(splits)},
        (str(heads), "B * L", "1"),
    )
    return Plan("split", "L <= 16", buffers, (attend, merge))
