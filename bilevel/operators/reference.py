"""The operators as loops: the definition that everything fast is tested against.

Read beside ``bilevel/contract.py`` (names, shapes, attributes). Slow on purpose, and without shortcuts: one position, one
head, one block at a time.

Normative rules kept here:

* A block j holds tokens ``j*R .. (j+1)*R-1``. A position t = past_len + i sees block j when the block's first token is valid
  and (causal) not after t. A block is *scored* only when its last token is valid and (causal) not after t: no score depends
  on a token that t may not see.
* Forced blocks (own, local, init) are kept whatever their score. If they alone exceed K: the own block, then the most recent
  local ones, then init.
* Scores are sums of products accumulated in fp32 from the inputs as stored. Order: score descending, index ascending. NaN
  counts as -inf and -inf is never selected; +inf counts as the largest finite number and so ties by index.
  In an fp64 model, sums and what is declared float32 are fp64.
* Routes are ascending, unique, -1 in the unused tail. Rows at or beyond new_len give -1 (routes) and 0 (output).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bilevel import contract
from bilevel.operators.precision import wide
from bilevel.operators.reference_rows import pack_row, unpack_row

_FLOAT_MAX = torch.finfo(torch.float32).max


def forced_blocks(own: int, horizon: int, attributes: dict[str, int]) -> list[int]:
    """The blocks kept whatever their score, most important first, at most topk of them. horizon: tokens that are visible."""
    block_size = attributes["block_size"]
    partial = [horizon // block_size] if attributes["partial_block"] == contract.ALWAYS_KEPT and horizon % block_size else []
    local = [own - i for i in range(attributes["local_blocks"]) if own - i >= 0]
    init = range(min(attributes["init_blocks"], -(-horizon // block_size)))
    return list(dict.fromkeys([*partial, *local, *init]))[: attributes["topk"]]


def _rank(score: float) -> float:
    """A score as the selection sees it: NaN is -inf, +inf is the largest finite number."""
    return -math.inf if math.isnan(score) else min(score, _FLOAT_MAX)


def _keep(
    score_of: Callable[[int], float], units: Sequence[int], position: int, valid: int, attributes: dict[str, int]
) -> Tensor:
    """int32 [K]: the route of one position among ``units`` (ascending), of which only those that may be scored are asked."""
    block_size, topk = attributes["block_size"], attributes["topk"]
    horizon = position + 1 if attributes["causal"] else valid  # tokens that this position may see
    forced = forced_blocks(position // block_size, horizon, attributes)
    needed = 1 if attributes["partial_block"] == contract.SCORED else block_size  # visible tokens of a block that is scored
    scored = [j for j in units if j not in forced and j * block_size + needed <= horizon]
    ranked = sorted((-_rank(score_of(j)), j) for j in scored)
    room = min(topk - len(forced), attributes["scored_topk"])
    kept = sorted(forced + [j for rank, j in ranked if rank < math.inf][:room])
    return torch.tensor(kept + [-1] * (topk - len(kept)), dtype=torch.int32)


def _route(
    query: Tensor, unit_key: Tensor, candidates: Tensor | None, past_len: Tensor, new_len: Tensor, attributes: dict[str, int]
) -> Tensor:
    num_selection_heads = attributes["num_selection_heads"]
    batch, num_route_heads, length, _ = query.shape
    num_key_heads, num_units = unit_key.shape[1:3]
    attributes = {**attributes, "scored_topk": attributes["topk"], "partial_block": contract.NEVER_SCORED}
    routes = torch.full((batch, num_selection_heads, length, attributes["topk"]), -1, dtype=torch.int32)
    for b, s, i in _rows(batch, num_selection_heads, new_len):
        allowed: Sequence[int] = range(num_units)
        if candidates is not None:
            row = candidates[b, s * candidates.shape[1] // num_selection_heads, i]
            allowed = sorted({int(j) for j in row if 0 <= int(j) < num_units})

        def score(j: int, b: int = b, s: int = s, i: int = i) -> float:
            total = 0.0
            for r in range(num_route_heads):
                if r * num_selection_heads // num_route_heads == s:
                    key = unit_key[b, r * num_key_heads // num_route_heads, j]
                    total += float(wide(query[b, r, i]) @ wide(key))
            return total

        past, valid = int(past_len[b]), int(past_len[b]) + int(new_len[b])
        routes[b, s, i] = _keep(score, allowed, past + i, valid, attributes)
    return routes


def _rows(batch: int, heads: int, new_len: Tensor) -> Iterator[tuple[int, int, int]]:
    """(row, selection head, token of the call) of everything that chooses."""
    return ((b, s, i) for b in range(batch) for s in range(heads) for i in range(int(new_len[b])))


def select_blocks(scores: Tensor, past_len: Tensor, new_len: Tensor, **attributes: int) -> Tensor:
    """Keep K blocks by given scores (contract: SelectBlocks).

    scores: fp32 [B, Hs, L, U], of whatever the caller means; those of blocks that a position may not choose are not read.
    past_len, new_len: int32 [B]. Returns int32 [B, Hs, L, K]. Queries of another sequence than the keys: causal 0, local_blocks
    0, and past_len such that past_len + new_len is the number of keys; a call holds at most as many queries as there are keys.
    """
    contract.SELECT_BLOCKS.check_attributes(attributes)
    batch, heads, length, num_units = scores.shape
    routes = torch.full((batch, heads, length, attributes["topk"]), -1, dtype=torch.int32)
    for b, s, i in _rows(batch, heads, new_len):
        row, past, valid = scores[b, s, i], int(past_len[b]), int(past_len[b]) + int(new_len[b])
        routes[b, s, i] = _keep(lambda j, row=row: float(row[j]), range(num_units), past + i, valid, attributes)  # type: ignore[misc]
    return routes


def coarse_route(query: Tensor, unit_key: Tensor, past_len: Tensor, new_len: Tensor, **attributes: int) -> Tensor:
    """Score every visible block and keep K (contract: CoarseRoute).

    query: [B, Hr, L, Dr]. unit_key: [B, Hk, U, Dr]. past_len, new_len: int32 [B]. Returns int32 [B, Hs, L, K].
    Route head r reads key head floor(r*Hk/Hr); the Hr/Hs heads of a selection head are summed.
    """
    contract.COARSE_ROUTE.check_attributes(attributes)
    return _route(query, unit_key, None, past_len, new_len, attributes)


def fine_route(
    query: Tensor, unit_key: Tensor, candidates: Tensor, past_len: Tensor, new_len: Tensor, **attributes: int
) -> Tensor:
    """The same among the candidates and the forced blocks (contract: FineRoute).

    candidates: int32 [B, Hc, L, K1], a set: order and repetition do not matter, indices out of range are ignored.
    Selection head s reads candidate head floor(s*Hc/Hs).
    """
    contract.FINE_ROUTE.check_attributes(attributes)
    return _route(query, unit_key, candidates, past_len, new_len, attributes)


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    past_len: Tensor,
    new_len: Tensor,
    sinks: Tensor | None = None,
    *,
    block_size: int,
    causal: int,
    scale: float,
) -> Tensor:
    """Softmax attention over the tokens of the routed blocks (contract: RoutedAttention).

    q: [B, Hq, L, D]. k: [B, Hkv, M, D]. v: [B, Hkv, M, Dv]. routes: int32 [B, Hs, L, K], a set. Returns [B, Hq, L, Dv] in q's
    dtype. Query head h reads selection head floor(h*Hs/Hq) and kv head floor(h*Hkv/Hq). A row without a visible token gives 0.
    sinks: fp32 [Hq], logits that take part in the softmax and whose weights go nowhere (contract: RoutedAttentionSinks).
    """
    batch, num_heads, length = q.shape[:3]
    num_kv_heads, capacity = k.shape[1:3]
    out = q.new_zeros(batch, num_heads, length, v.shape[3])
    for b in range(batch):
        valid = int(past_len[b]) + int(new_len[b])
        for i in range(int(new_len[b])):
            horizon = int(past_len[b]) + i + 1 if causal else valid
            for h in range(num_heads):
                row = routes[b, h * routes.shape[1] // num_heads, i]
                blocks = sorted({int(j) for j in row if 0 <= int(j) < capacity // block_size})
                tokens = [t for j in blocks for t in range(j * block_size, (j + 1) * block_size) if t < horizon]
                if not tokens:
                    continue
                keys = wide(k[b, h * num_kv_heads // num_heads, tokens])
                values = wide(v[b, h * num_kv_heads // num_heads, tokens])
                scores = keys @ wide(q[b, h, i]) * scale
                if sinks is not None:
                    scores = torch.cat([scores, sinks[h : h + 1].to(scores.dtype)])
                probability = torch.softmax(scores, dim=0)[: len(tokens)]
                out[b, h, i] = (probability @ values).to(q.dtype)
    return out


def routed_attention_sinks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    past_len: Tensor,
    new_len: Tensor,
    sinks: Tensor,
    **attributes: float,
) -> Tensor:
    """``routed_attention`` with sinks fp32 [Hq] (contract: RoutedAttentionSinks; gpt-oss's, openai/gpt-oss model.py)."""
    return routed_attention(q, k, v, routes, past_len, new_len, sinks, **attributes)  # type: ignore[arg-type]


def sqrt_softplus(x: Tensor) -> Tensor:
    """sqrt(log(1 + e^x)), to a few units in the last place and with finite gradients wherever ``x`` is (DeepSeek-V4's scores).

    Far below 0 the logarithm is e^x, which is gone at -104 in fp32; its root e^(x/2) (1 - e^x/4 + ...) is not.
    """
    low = x.clamp(max=0)
    tail = torch.exp(low / 2) * (1 - torch.exp(low) / 4)
    return torch.where(x < -20, tail, torch.nn.functional.softplus(x.clamp(min=-20), threshold=50).sqrt())


def expert_route(
    logits: Tensor,
    group_logits: Tensor,
    select_bias: Tensor,
    *,
    top_k: int,
    topk_group: int,
    score_func: str,
    group_score: str,
    normalize: int,
    scale: float,
    norm_floor: float = 0.0,
    zero_fill: int = 0,
) -> tuple[Tensor, Tensor]:
    """Keep ``topk_group`` groups of experts, then the ``top_k`` best inside them (contract: ExpertRoute).

    logits: fp32 [T, E]. group_logits: fp32 [T, Gp]. select_bias: fp32 [E]. Returns ids int32 [T, top_k], best first, and
    weights fp32 [T, top_k]; -1 and 0 in the slots for which no finite score is left. The choice uses score + bias, the
    weights the unbiased score (DeepSeek-V3, arXiv 2412.19437, equations 13 to 16). A group that is not kept counts as -inf, or
    with ``zero_fill`` = 1 as 0, which wins against negative biased scores (transformers' mistral4, deepseek_v2, axk2); an
    expert whose own biased score is -inf is chosen from no group. What normalises is the sum plus 1e-20, and at least
    ``norm_floor`` (ERNIE 4.5's moe_norm_min).
    """
    num_tokens, num_experts = logits.shape
    num_groups = group_logits.shape[1]
    size = num_experts // num_groups
    ids = torch.full((num_tokens, top_k), -1, dtype=torch.int32)
    weights = logits.new_zeros(num_tokens, top_k)
    for t in range(num_tokens):
        scores = {
            "sigmoid": torch.sigmoid,
            "softmax": lambda row: torch.softmax(row, dim=0),
            "sqrtsoftplus": sqrt_softplus,
        }[score_func](logits[t])
        choice = [_rank(float(score + bias)) for score, bias in zip(scores, select_bias, strict=True)]
        groups = []
        for g in range(num_groups):
            best = sorted(choice[g * size : (g + 1) * size], reverse=True)
            value = {
                "max": best[0],
                "top2_sum": float(logits.new_tensor(best[:2]).sum()),
                "external": _rank(float(group_logits[t, g])),
            }[group_score]
            groups.append((-_rank(value), g))
        kept_groups = {g for value, g in sorted(groups)[:topk_group] if value < math.inf}
        inside = [
            (-choice[e] if e // size in kept_groups else 0.0, e)
            for e in range(num_experts)
            if choice[e] > -math.inf and (zero_fill or e // size in kept_groups)
        ]
        kept = [e for _, e in sorted(inside)[:top_k]]
        total = max(sum(float(scores[e]) for e in kept) + 1e-20, norm_floor) if normalize else 1.0
        for slot, e in enumerate(kept):
            ids[t, slot] = e
            weights[t, slot] = float(scores[e]) / total * scale
    return ids, weights


def gated(gate: Tensor, up: Tensor, gate_scale: float = 1.0, limit: float = 0.0, up_shift: float = 0.0) -> Tensor:
    """SwiGLU's hidden layer, gate * sigmoid(gate_scale * gate) * (up + up_shift), both sides bounded first where ``limit`` is
    not 0 (MiniMax-M3 and gpt-oss: 1.702, 7, 1; DeepSeek-V4: 1, 10, 0)."""
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    if gate_scale == 1 and not up_shift:
        return torch.nn.functional.silu(gate) * up
    return gate * torch.sigmoid(gate * gate_scale) * (up + up_shift)


def routed_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    gate_scale: float = 1.0,
    limit: float = 0.0,
    up_shift: float = 0.0,
) -> Tensor:
    """The weighted sum of the chosen experts' SwiGLU (contract: RoutedExperts).

    x: [T, d]. ids, weights: [T, k]; ids out of range are ignored. gate_up: [E, 2f, d], gate rows first. down: [E, d, f].
    Returns [T, d] in x's dtype; the sum over experts is accumulated in fp32.
    """
    num_experts, width = down.shape[0], down.shape[2]
    out = wide(torch.zeros_like(x))
    for t in range(x.shape[0]):
        for expert, weight in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            if 0 <= expert < num_experts:
                hidden = gate_up[expert] @ x[t]
                activated = gated(hidden[:width], hidden[width:], gate_scale, limit, up_shift)
                out[t] += weight * wide(down[expert] @ activated)
    return out.to(x.dtype)


def dequantise(codes: Tensor, scales: Tensor, zeros: Tensor, width: int, bits: int, block_size: int) -> Tensor:
    """Packed rows as numbers: (code - zero) * scale, [..., width] in the dtype of ``scales``.

    codes: uint8 [..., P]. scales, zeros: [..., S], one per block of ``block_size`` along the row; what is packed behind
    ``width`` is ignored. 8 bits: a byte is a code. 4 bits: byte i of a block holds code i in its lower half, code i +
    block_size/2 in its upper.
    """
    blocks = codes.unflatten(-1, (scales.shape[-1], block_size * bits // 8))
    if bits == 4:
        blocks = torch.cat([blocks & 15, blocks >> 4], dim=-1)
    return ((blocks.to(scales.dtype) - zeros[..., None]) * scales[..., None]).flatten(-2)[..., :width]


def routed_experts_quantized(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up_codes: Tensor,
    gate_up_scales: Tensor,
    gate_up_zeros: Tensor,
    down_codes: Tensor,
    down_scales: Tensor,
    down_zeros: Tensor,
    *,
    bits: int,
    block_size: int,
) -> Tensor:
    """``routed_experts`` over the numbers that the packed weights stand for, in x's dtype (contract: RoutedExpertsQuantized).

    gate_up_codes: uint8 [E, 2f, Pd], scales fp32 and zeros uint8 [E, 2f, Sd]. down_codes: uint8 [E, d, Pf], the others [E, d,
    Sf].
    """
    gate_up = dequantise(gate_up_codes, gate_up_scales, gate_up_zeros, x.shape[1], bits, block_size)
    down = dequantise(down_codes, down_scales, down_zeros, gate_up_codes.shape[1] // 2, bits, block_size)
    return routed_experts(x, ids, weights, gate_up.to(x.dtype), down.to(x.dtype))


def write_cache(cache: Tensor, update: Tensor, start: Tensor) -> Tensor:
    """The cache with the update at each row's start (contract: WriteCache).

    cache: [B, H, M, W]. update: [B, H, L, W]. start: int32 [B]. What would lie outside the cache is left out.
    """
    out = cache.clone()
    for b in range(update.shape[0]):
        for i in range(update.shape[2]):
            place = int(start[b]) + i
            if 0 <= place < cache.shape[2]:
                out[b, :, place] = update[b, :, i]
    return out


def write_cache_quantized(update: Tensor, cache: Tensor, start: Tensor, *, bits: int, groups: int) -> Tensor:
    """The packed cache with the update at each row's start (contract: WriteCacheQuantized).

    update: [B, H, L, D]. cache: uint8 [B, H, M, C]. start: int32 [B], start + L <= M.
    """
    out = cache.clone()
    for b in range(update.shape[0]):
        for h in range(update.shape[1]):
            for i in range(update.shape[2]):
                row = pack_row(update[b, h, i].float().tolist(), bits, groups)
                out[b, h, int(start[b]) + i] = torch.tensor(row, dtype=torch.uint8)
    return out


def unpack_cache(rows: Tensor, *, bits: int, groups: int, width: int) -> Tensor:
    """The numbers fp32 [..., D] of rows uint8 [..., C] of a packed cache (contract: UnpackCache)."""
    numbers = [unpack_row(row, width, bits, groups) for row in rows.flatten(0, -2).tolist()]
    return torch.tensor(numbers, dtype=torch.float32).reshape(*rows.shape[:-1], width)


def routed_attention_quantized(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    past_len: Tensor,
    new_len: Tensor,
    *,
    block_size: int,
    causal: int,
    scale: float,
    bits: int,
    groups: int,
) -> Tensor:
    """``routed_attention`` over the numbers of packed caches uint8 [B, Hkv, M, C] (contract: RoutedAttentionQuantized)."""
    k, v = (unpack_cache(cache, bits=bits, groups=groups, width=q.shape[3]).to(q.dtype) for cache in (k, v))
    return routed_attention(q, k, v, routes, past_len, new_len, block_size=block_size, causal=causal, scale=scale)
