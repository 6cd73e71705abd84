"""The plans of SelectBlocks, CoarseRoute, FineRoute and RoutedAttention (see ``plugins/launch/plans.py``; standard library
only)."""

from __future__ import annotations

from bilevel import contract
from bilevel.errors import ContractError
from bilevel.plugins.launch.launches import Buffer, Builder, Geometry, LaunchPlan
from bilevel.plugins.launch.tiles import (
    attention_tile,
    decode_tile,
    power_of_two,
    route_tile,
    row_tile,
    select_tile,
    small_tile,
)

MAX_GROUP = 64  # query heads that share a key/value head and a choice: they fill the rows of a tile
_UNITS = 256  # blocks that one program of coarse_route_split scores
_ROUTE_NAMES = {"HR": "Hr", "HK": "Hk", "HS": "num_selection_heads", "DR": "Dr", "BLOCK": "block_size", "CAUSAL": "causal"}
_SCORES = 1024  # scores that one program of select_blocks_split reads
_SELECT_NAMES = {"HS": "Hs", "K": "topk", "BLOCK": "block_size", "PARTIAL": "partial_block", "CAUSAL": "causal"}
_ATTENTION_NAMES = {
    "HQ": "Hq",
    "HKV": "Hkv",
    "HS": "Hs",
    "D": "D",
    "DV": "Dv",
    "K": "K",
    "BLOCK": "block_size",
    "CAUSAL": "causal",
}


def _route_constants(g: Geometry) -> dict[str, int]:
    """What the kernels of both routing operators share."""
    heads, key_heads, choices = g["Hr"], g["Hk"], g["num_selection_heads"]
    read = key_heads // choices if key_heads % choices == 0 else 1 if choices % key_heads == 0 else heads // choices
    constants = {constant: g[name] for constant, name in _ROUTE_NAMES.items()}
    constants |= {"K": g["topk"], "KP": power_of_two(g["topk"]), "KEY_HEADS": read, "SUMMED": heads // choices // read}
    return {**constants, "INIT": min(g["init_blocks"], g["topk"]), "LOCAL": min(g["local_blocks"], g["topk"])}


def plan_coarse_route(g: Geometry, dtype: str, arch: int) -> tuple[LaunchPlan, ...]:
    constants, choices, topk = _route_constants(g), str(g["num_selection_heads"]), g["topk"]
    splits = f"ceil_div(U, {_UNITS})"
    ranks = Buffer("ranks", "int64", f"B * {choices} * L * {splits} * {topk}")
    make = Builder(contract.COARSE_ROUTE, dtype, (ranks,), splits=splits)
    row, tile = row_tile(g["Dr"]), route_tile(g["Dr"], topk, dtype, arch)
    split = make.launch(
        "routes.coarse_route_split",
        "query unit_key past_len new_len ranks length units splits",
        {**constants, "UNITS": _UNITS, "COLS": row.cols, "DEPTH": row.depth},
        (splits, choices, "B * L"),
        row,
    )
    merge = make.launch(
        "routes.coarse_route_merge",
        "ranks routes length splits",
        {"HS": constants["HS"], "K": topk, "SCORED_K": topk, "COLS": 128, "KP": constants["KP"]},
        ("L", choices, "B"),
        small_tile(1),
    )
    summed_first = int(dtype == "float32" and constants["SUMMED"] > 1)
    tiles = make.launch(
        "routes.coarse_route_tiles",
        "query unit_key past_len new_len routes length units",
        {**constants, "ROWS": tile.rows, "COLS": tile.cols, "DEPTH": tile.depth, "SUM_FIRST": summed_first},
        (f"ceil_div(L, {tile.rows})", choices, "B"),
        tile,
    )
    return LaunchPlan("split", "L <= 8", (ranks,), (split, merge)), LaunchPlan("tiles", "", (), (tiles,))


def plan_select_blocks(g: Geometry, dtype: str, arch: int) -> tuple[LaunchPlan, ...]:
    choices, topk = str(g["Hs"]), g["topk"]
    constants = {constant: g[name] for constant, name in _SELECT_NAMES.items()}
    constants |= {"INIT": min(g["init_blocks"], topk), "LOCAL": min(g["local_blocks"], topk), "KP": power_of_two(topk)}
    limit = {"SCORED_K": min(g["scored_topk"], topk)}
    splits = f"ceil_div(U, {_SCORES})"
    ranks = Buffer("ranks", "int64", f"B * {choices} * L * {splits} * {topk}")
    make = Builder(contract.SELECT_BLOCKS, dtype, (ranks,), splits=splits)
    row, tile = small_tile(1), select_tile(topk)
    split = make.launch(
        "routes.select_blocks_split",
        "scores past_len new_len ranks length units splits",
        {**constants, "UNITS": _SCORES, "COLS": 64},
        (splits, choices, "B * L"),
        row,
    )
    merge = make.launch(
        "routes.coarse_route_merge",
        "ranks routes length splits",
        {"HS": g["Hs"], "K": topk, **limit, "COLS": 128, "KP": constants["KP"]},
        ("L", choices, "B"),
        row,
    )
    tiles = make.launch(
        "routes.select_blocks_tiles",
        "scores past_len new_len routes length units",
        {**constants, **limit, "ROWS": tile.rows, "COLS": tile.cols},
        (f"ceil_div(L, {tile.rows})", choices, "B"),
        tile,
    )
    return LaunchPlan("split", "L <= 8", (ranks,), (split, merge)), LaunchPlan("tiles", "", (), (tiles,))


def plan_fine_route(g: Geometry, dtype: str, arch: int) -> tuple[LaunchPlan, ...]:
    constants, row = _route_constants(g), row_tile(g["Dr"])
    constants |= {"HC": g["Hc"], "K1": g["K1"], "COLS": row.cols, "DEPTH": row.depth}
    launch = Builder(contract.FINE_ROUTE, dtype).launch(
        "routes.fine_route_rows",
        "query unit_key candidates past_len new_len routes length units",
        {**constants, "FP": power_of_two(constants["INIT"] + constants["LOCAL"])},
        ("L", str(g["num_selection_heads"]), "B"),
        row,
    )
    return (LaunchPlan("rows", "", (), (launch,)),)


def head_groups(g: Geometry) -> int:
    """Groups of query heads that share a key/value head and a choice; where heads do not nest, every head is one."""
    heads, kv_heads, choices = g["Hq"], g["Hkv"], g["Hs"]
    groups = choices if choices % kv_heads == 0 else kv_heads if kv_heads % choices == 0 else heads
    if heads // groups > MAX_GROUP:
        raise ContractError(
            f"RoutedAttention: {heads // groups} query heads share a key/value head and a choice; the kernels take {MAX_GROUP}"
        )
    return int(groups)


def _attention_constants(g: Geometry, cols: int, depth: int) -> dict[str, int]:
    constants = {constant: g[name] for constant, name in _ATTENTION_NAMES.items()}
    per_block = min(cols, power_of_two(g["block_size"]))
    return {
        **constants,
        "GROUPS": head_groups(g),
        "COLS": cols,
        "PER_BLOCK": per_block,
        "DP": depth,
        "KP": power_of_two(g["K"]),
    }


def _pick(constants: dict[str, int], names: str) -> dict[str, int]:
    return {name: constants[name] for name in names.split()}


def plan_routed_attention(g: Geometry, dtype: str, arch: int) -> tuple[LaunchPlan, ...]:
    return _attention_split(g, dtype, arch), _attention_tiles(g, dtype, arch)


def _attention_tiles(g: Geometry, dtype: str, arch: int) -> LaunchPlan:
    """Many tokens: tiles of positions, and the blocks that some position of a tile kept."""
    groups, choices = head_groups(g), str(g["Hs"])
    tile = attention_tile(max(g["D"], g["Dv"]), g["Hq"] // groups, g["block_size"], dtype, arch)
    tokens = tile.rows // (g["Hq"] // groups)
    tiles = f"ceil_div(L, {tokens})"
    # A tile lists no more blocks than its positions have slots, and no more than there are.
    slots = f"(1 + min({tokens * g['K']}, floor_div(M, {g['block_size']})))"
    count = f"B * {choices} * {tiles} * {slots}"
    buffers = (Buffer("blocks", "int32", count), Buffer("bits", "int32" if tokens <= 32 else "int64", count))
    make = Builder(contract.ROUTED_ATTENTION, dtype, buffers, slots=slots)
    constants = {**_attention_constants(g, tile.cols, tile.depth), "TOKENS": tokens, "ROWS": tile.rows}
    plan = make.launch(
        "attention.attention_plan",
        "routes past_len new_len blocks bits length capacity slots",
        {**_pick(constants, "HS K BLOCK CAUSAL TOKENS KP"), "TOKENS_P": power_of_two(tokens)},
        (tiles, choices, "B"),
        small_tile(4),
    )
    attend = make.launch(
        "attention.attention_tiles",
        "q k v past_len new_len blocks bits out length capacity slots scale",
        _pick(constants, "HQ HKV HS GROUPS D DV BLOCK CAUSAL TOKENS ROWS COLS PER_BLOCK DP"),
        (tiles, str(groups), "B"),
        tile,
    )
    return LaunchPlan("tiles", "", buffers, (plan, attend))


def _attention_split(g: Geometry, dtype: str, arch: int) -> LaunchPlan:
    """Few tokens: the kept blocks of one token are split among programs, whose results are merged."""
    groups, heads, topk = head_groups(g), g["Hq"], g["K"]
    tile = decode_tile(max(g["D"], g["Dv"]), heads // groups, g["block_size"], dtype, arch)
    # 64 tokens: enough to be worth a partial result, few enough to fill a GPU with one row.
    split = max(1, 64 // power_of_two(g["block_size"]))
    splits = -(-topk // split)
    buffers = (
        Buffer("partial", "float32", f"B * L * {heads * splits * g['Dv']}"),
        Buffer("statistics", "float32", f"B * L * {heads * splits * 2}"),
    )
    make = Builder(contract.ROUTED_ATTENTION, dtype, buffers)
    constants = {**_attention_constants(g, tile.cols, tile.depth), "SPLIT": split, "SPLITS": splits, "ROWS": tile.rows}
    attend = make.launch(
        "decode.attention_split",
        "q k v routes past_len new_len partial statistics length capacity scale",
        constants,
        (str(splits), str(groups), "B * L"),
        tile,
    )
    merge = make.launch(
        "decode.attention_merge",
        "routes past_len new_len partial statistics out length capacity",
        {**_pick(constants, "HQ HS DV K BLOCK CAUSAL SPLITS DP KP"), "COLS": 16, "SP": power_of_two(splits)},
        (str(heads), "B * L", "1"),
        small_tile(4),
    )
    return LaunchPlan("split", "L <= 16", buffers, (attend, merge))
