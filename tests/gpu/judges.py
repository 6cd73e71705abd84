"""Whether outputs are right, for ``make gpu-test``: a choice must be equal, a computation near float64's.

The other side is PyTorch's vectorised form (which ``tests/`` hold against the loops of ``bilevel/operators/reference.py``) on
the same device, and for small calls the loops themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel import contract
from bilevel.operators import attention, experts, reference, routing
from tests.gpu.machine import Attributes, Inputs

FORMS = {"coarse_route": routing.coarse_route, "fine_route": routing.fine_route, "routed_attention": attention.routed_attention}
FORMS |= {"expert_route": experts.expert_route, "routed_experts": experts.routed_experts}
FORMS |= {"select_blocks": routing.select_blocks}
FORMS |= {"write_cache": reference.write_cache}
_MOST = 2.0  # times the error that plain PyTorch makes in the same precision
_SINGLE = 1e-5  # of the largest magnitude: fp32 must be that good whatever PyTorch's error is
_WEIGHT = 2e-6  # of the scale: an expert's weight
_SMALL = 5_000  # a call with fewer scores is also given to the loops


def plain_outputs(name: str, inputs: Inputs, attributes: Attributes) -> list[Tensor]:
    """PyTorch's form, which never is a kernel of ours."""
    found: Any = FORMS[contract.BY_NAME[name].torch_name](*inputs.values(), **attributes)
    return list(found) if isinstance(found, tuple) else [found]


def exact_output(name: str, inputs: Inputs, attributes: Attributes) -> Tensor:
    """The computation in float64."""
    wide = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    return plain_outputs(name, wide, attributes)[0]


def loops_output(name: str, inputs: Inputs, attributes: Attributes) -> Tensor:
    form = getattr(reference, contract.BY_NAME[name].torch_name)
    found = form(*(x.cpu() for x in inputs.values()), **attributes)
    return (found[0] if isinstance(found, tuple) else found).to(next(iter(inputs.values())).device)


def error_of(out: Tensor, truth: Tensor) -> tuple[float, float]:
    """(root mean square, largest) difference; NaN in only one of them is an infinite one."""
    difference = (out.double() - truth).abs()
    difference = torch.where(out.isnan() & truth.isnan(), 0.0, difference).nan_to_num(torch.inf, torch.inf, torch.inf)
    return (float(difference.square().mean().sqrt()), float(difference.max())) if out.numel() else (0.0, 0.0)


def judge_error(out: Tensor, plain: Tensor, truth: Tensor) -> tuple[str, bool]:
    """At most twice PyTorch's error in this precision; 0 where the truth is 0 (rows that see nothing)."""
    got, other = error_of(out, truth), error_of(plain, truth)
    # Below a rounding of the largest result the quotient of two errors is that of two accidents.
    largest = max(float(truth.nan_to_num().abs().max()), 1e-30) if out.numel() else 1.0
    least = torch.finfo(out.dtype).eps * largest / 4
    ratio = max(mine / max(theirs, least) for mine, theirs in zip(got, other, strict=True))
    relative = got[1] / largest
    idle = (truth == 0).all(-1)
    right = ratio <= _MOST and bool((out[idle] == 0).all()) and (out.dtype != torch.float32 or relative <= _SINGLE)
    return f"{ratio:.2f} times PyTorch's error, largest {relative:.1e}", right


def judge_choice(name: str, out: Tensor, inputs: Inputs, attributes: Attributes) -> tuple[str, bool]:
    """Every entry equal to PyTorch's form and, for a small call, to the loops."""
    expected = plain_outputs(name, inputs, attributes)[0]
    wrong, by = int((out != expected).sum()), "PyTorch"
    first = next(iter(inputs.values()))
    others = inputs["unit_key"].shape[2] if "unit_key" in inputs else 1
    if first.shape[:-1].numel() * others <= _SMALL:
        wrong, by = wrong + int((out != loops_output(name, inputs, attributes)).sum()), "PyTorch and the loops"
    return f"{wrong} of {out.numel()} entries differ from {by}", wrong == 0


def judge(name: str, outputs: Sequence[Tensor], inputs: Inputs, attributes: Attributes) -> tuple[str, bool]:
    """(what was found, whether it is right) of one call's outputs."""
    if name in ("RoutedAttention", "RoutedExperts"):
        (plain,) = plain_outputs(name, inputs, attributes)
        return judge_error(outputs[0], plain, exact_output(name, inputs, attributes))
    text, right = judge_choice(name, outputs[0], inputs, attributes)
    if name != "ExpertRoute":
        return text, right
    given = {key: attributes[key] for key in ("score_func", "normalize", "scale", "norm_floor")}
    truth = experts.weights_of(inputs["logits"].double(), outputs[0], **given)
    # A GPU's exponential and division are good to two units of the last place, which PyTorch's sigmoid is better than.
    relative = error_of(outputs[1], truth)[1] / float(attributes["scale"])
    return f"{text}; weights off by {relative:.1e} at most", right and relative <= _WEIGHT


def wrong_rows(routes: Tensor, scores: Tensor, tolerance: float) -> int:
    """Rows of routes int32 [n, K] that left out a block better by ``tolerance`` than one they kept, or kept too few.

    scores: fp64 [n, N]; -inf: must not be kept.
    """
    kept = routing.block_mask(routes, scores.shape[1])
    allowed = scores > -torch.inf
    number = allowed.sum(-1).clamp(max=routes.shape[1])
    least = torch.where(kept, scores, torch.inf).amin(-1)
    best = torch.where(kept, -torch.inf, scores).amax(-1)
    return int(((kept.sum(-1) != number) | (kept & ~allowed).any(-1) | (least < best - tolerance)).sum())
