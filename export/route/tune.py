"""Low-rank updates of queries and keys (LoRA, arXiv 2106.09685) that teach a routed model to say what the dense one says.

Both read the same rows, and the updates follow the divergence between the two; which blocks are read follows the updated
queries and keys through the frozen gates. Everything else of the model is frozen. Layers are computed again on the way back, so
that memory grows with the inside of one layer, not of all of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from bilevel.config import Routing
from bilevel.errors import CheckpointError
from bilevel.export.route.adapter import low_rank_changes
from bilevel.export.route.rows import Row, training_row
from bilevel.export.route.source import Options, Report, Source
from bilevel.export.route.walk import read
from bilevel.export.route.work import TUNE, read_state, write_state
from bilevel.model import Attention, CausalLM
from bilevel.training import learning_rate

RANK, LENGTH = 16, 2048
PROJECTIONS = ("q_proj", "k_proj")
FACTORS = ("lora_A", "lora_B")
_PEAK, _WARMUP = 5e-4, 5
_WORDS = 512  # of a row whose logits are compared, beside those before answers
_CHUNK = 128  # words whose logits are held at a time
_FIRST_ROW, _HELDOUT_ROW = 1_000_000, 2_000_000  # the gates learned from those before
_HELDOUT = 2


class LowRank(nn.Module):
    """A weight [out, in] plus lora_B [out, r] @ lora_A [r, in]; nothing at first."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rank = min(RANK, *weight.shape)
        self.lora_A = nn.Parameter(torch.empty(rank, weight.shape[1]))
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], rank))
        nn.init.normal_(self.lora_A, std=weight.shape[1] ** -0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return (weight.float() + self.lora_B @ self.lora_A).to(weight.dtype)


def apply(model: CausalLM, tuned: Mapping[str, Tensor]) -> None:
    """Add the updates to the model's weights."""
    for name, change in low_rank_changes(tuned).items():
        weight = model.get_parameter(name)
        weight.data = (weight.data.float() + change).to(weight.dtype)


def student(
    model: CausalLM, routing: Routing, gates: Mapping[int, Mapping[str, Tensor]], words: Mapping[str, Tensor]
) -> CausalLM:
    """The routed model with the dense one's own tensors, and updates in every layer's queries and keys that can learn."""
    config = dataclasses.replace(model.config, routing=routing)
    with torch.device("meta"):
        routed = CausalLM(config)
    state = dict(model.state_dict())
    state |= {
        f"model.layers.{layer}.self_attn.block_keys.{name}": tensor
        for layer in config.routed_layers
        for name, tensor in gates.get(layer, {}).items()
    }
    state |= {f"model.word_router.{name}": tensor.to(model.lm_head.weight.dtype) for name, tensor in words.items()}
    routed.load_state_dict(state, assign=True)
    routed.eval().requires_grad_(False)
    routed.model.recomputes_layers = True
    for attention in _attentions(routed):
        for name in PROJECTIONS:
            linear = attention.get_submodule(name)
            parametrize.register_parametrization(linear, "weight", LowRank(linear.get_parameter("weight")))
    return routed


def _attentions(model: CausalLM) -> list[Attention]:
    return [module for layer in model.model.layers for module in layer.children() if isinstance(module, Attention)]


def factors(routed: CausalLM) -> dict[str, Tensor]:
    """What was learned, by its name in an adapter (peft's)."""
    learned = {}
    for layer, attention in enumerate(_attentions(routed)):
        for name in PROJECTIONS:
            update = attention.get_submodule(f"{name}.parametrizations.weight.0")
            for factor in FACTORS:
                learned[f"model.layers.{layer}.self_attn.{name}.{factor}.weight"] = (
                    update.get_parameter(factor).detach().clone()
                )
    return learned


def hidden(model: CausalLM, ids: Tensor) -> Tensor:
    """The stream [1, L, d] behind the last norm, of a whole text int64 [L]."""
    past = torch.zeros(1, dtype=torch.int32)
    return model.model(ids[None], past, torch.full_like(past, len(ids)), None)[0]


def divergence(head: nn.Linear, taught: Tensor, said: Tensor, weight: Tensor) -> Tensor:
    """Sum over words of weight [S] times KL(dense || routed), from streams [S, d] behind the last norm; a scalar."""

    def part(taught: Tensor, said: Tensor, weight: Tensor) -> Tensor:
        target, log_p = head(taught).float().log_softmax(-1), head(said).float().log_softmax(-1)
        return ((target.exp() * (target - log_p)).sum(-1) * weight).sum()

    parts = zip(taught.split(_CHUNK), said.split(_CHUNK), weight.split(_CHUNK), strict=True)
    return torch.stack([checkpoint(part, *each, use_reentrant=False) for each in parts]).sum()


def pick(row: Row, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Positions int64 [S] of a row's words that are compared, and their weights [S]: answers count as much as all others."""
    answers = np.unique(row.answers)
    others = np.setdiff1d(np.arange(len(row.ids)), answers)
    others = np.sort(rng.permutation(others)[:_WORDS])
    weights = [np.full(len(each), 1 / max(1, len(each))) for each in (answers, others)]
    positions = torch.from_numpy(np.concatenate([answers, others]))
    return positions, torch.from_numpy(np.concatenate(weights) / sum(len(each) > 0 for each in (answers, others))).float()


class _Run:
    """The rows of a run and the loss on each; which row comes when depends on the seed alone."""

    def __init__(self, source: Source, routed: CausalLM, seed: int) -> None:
        self.source, self.routed, self.seed = source, routed, seed
        self.length = min(LENGTH, source.config.max_position_embeddings)

    def loss(self, index: int, *, heldout: bool = False) -> Tensor:
        documents, first = (self.source.heldout, _HELDOUT_ROW) if heldout else (self.source.training, _FIRST_ROW)
        row = training_row(documents, self.source.tokenizer, self.length, self.seed, first + index)
        positions, weight = pick(row, np.random.default_rng([self.seed, index, 4]))
        ids = torch.from_numpy(row.ids)
        taught = read(self.source.model, ids, {}).hidden
        assert taught is not None
        said = hidden(self.routed, ids)
        # Inference mode's tensors take no part in autograd; a copy does.
        return divergence(self.routed.lm_head, taught[0, positions].clone(), said[0, positions], weight)


def tune(
    source: Source, routing: Routing, gates: Mapping[int, Mapping[str, Tensor]], words: Mapping[str, Tensor],
    work: Path, options: Options, report: Report,
) -> tuple[dict[str, Tensor], dict[str, Any]]:  # fmt: skip
    """(the factors, a log). work: a folder whose ``tune.pt`` a run goes on from. Raises CheckpointError."""
    learnt = {**words, **{f"{layer}.{name}": tensor for layer, gate in gates.items() for name, tensor in gate.items()}}
    plan = {
        "base": source.base["sha256"], "routing": repr(routing), "seed": options.seed, "updates": options.tune,
        "rank": RANK, "peak": _PEAK, "precision": source.precision,
        "texts": source.digest,
        "gates": hashlib.sha256(b"".join(learnt[name].float().numpy().tobytes() for name in sorted(learnt))).hexdigest(),
    }  # fmt: skip
    torch.manual_seed(options.seed)
    routed = student(source.model, routing, gates, words)
    learned = [each for each in routed.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=_PEAK, weight_decay=0.0, betas=(0.9, 0.98))
    run, path = _Run(source, routed, options.seed), work / TUNE
    first, log = _restored(path, plan, learned, optimizer)
    if first == 0:
        report.stage("tuning: measuring what routing changes")
        log.append({"update": 0, "heldout": _heldout(run)})
    saved = time.monotonic()
    for update in range(first, options.tune):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(update, options.tune, peak=_PEAK, warmup=min(_WARMUP, options.tune // 2))
        value = run.loss(update)
        value.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.append({"update": update + 1, "loss": round(value.item(), 5)})
        report.advance("tuning", update + 1, options.tune, f"divergence {value.item():.4f} nats")
        if time.monotonic() - saved >= options.save_seconds or update + 1 == options.tune:
            work.mkdir(parents=True, exist_ok=True)
            state = {"plan": plan, "step": update + 1, "factors": [each.detach() for each in learned], "log": log}
            write_state(path, {**state, "optimizer": optimizer.state_dict()})
            saved = time.monotonic()
    log.append({"update": options.tune, "heldout": _heldout(run)})
    return factors(routed), {"plan": {**plan, "length": run.length}, "log": log}


def precision_of(work: Path) -> torch.dtype | None:
    """What an unfinished run computes in; another machine's speed, or a busy one's, must not change that."""
    path = work / TUNE
    plan = read_state(path).get("plan") if path.is_file() else None
    return getattr(torch, str(plan["precision"])) if isinstance(plan, dict) and "precision" in plan else None


@torch.no_grad()
def _heldout(run: _Run) -> float:
    """The mean loss on rows of held-out documents."""
    return round(sum(run.loss(index, heldout=True).item() for index in range(_HELDOUT)) / _HELDOUT, 5)


def _restored(
    path: Path, plan: dict[str, Any], learned: list[nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[int, list[dict[str, Any]]]:
    """(The update to go on with, the log so far)."""
    if not path.is_file():
        return 0, []
    state = read_state(path)
    if state.get("plan") != plan:
        raise CheckpointError(
            f"{path} belongs to another run (other options or another choice of blocks); remove it to begin anew"
        )
    with torch.no_grad():
        for parameter, value in zip(learned, state["factors"], strict=True):
            parameter.copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"]), list(state["log"])
