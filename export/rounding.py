"""What a bundle with int8 or int4 weights is compared with, and what the rounding changed.

Such a bundle computes with other numbers than its checkpoint, so other routes than the checkpoint's are no fault by themselves.
Three things are kept apart:

  the export      PyTorch over the checkpoint's weights, rounded here as the export rounds them (from the checkpoint, not read out
                  of the file), against the file computing with fp32 activations: the same limits as for an fp32 bundle.
  activations     ONNX Runtime rounds activations to 8 bits inside every quantised product. The shipped file may be at most twice
                  as far from that reference (KL) as PyTorch itself is when it rounds its activations alike (design section 9).
  the effect      routes, next token and loss of the shipped file against the checkpoint as it was trained: reported, not judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel.export.choices import as_set
from bilevel.export.end_to_end import KL_LIMIT, Device, divergence
from bilevel.export.judge import Array, Selection, count_equal
from bilevel.export.probe import Probe
from bilevel.export.quantise import BITS, BLOCK, quantise_matrix
from bilevel.export.replay import chosen, routed_steps
from bilevel.model import CausalLM
from bilevel.state import Trace
from bilevel.word_router import WordRouter

ALLOWED_FACTOR = 2  # how much further from the reference than PyTorch with activations of the same precision


def _rounded_layers(model: CausalLM) -> list[nn.Linear]:
    """The linear layers whose weights the export rounds: all but a router's own."""
    router = {id(part) for module in model.modules() if isinstance(module, WordRouter) for part in module.modules()}
    return [module for module in model.modules() if isinstance(module, nn.Linear) and id(module) not in router]


def round_weights(model: CausalLM, weights: str) -> None:
    """Replace the weights of ``model`` by what the format ``weights`` keeps of them; a tied embedding table stays as it is."""
    if weights == "fp32":
        return
    for layer in _rounded_layers(model):
        rounded = quantise_matrix(layer.weight.detach().numpy().T, BITS[weights]).dequantise()
        layer.weight = nn.Parameter(torch.from_numpy(np.ascontiguousarray(rounded.T)), requires_grad=False)


def _round_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    """Activations [..., K] in blocks of 32 that share a scale, each in one of 255 steps."""
    (x,) = inputs
    blocks = F.pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    rounded = torch.where(step > 0, (blocks / step).round() * step, 0.0)
    return (rounded.flatten(-2)[..., : x.shape[-1]],)


@contextmanager
def rounded_activations(model: CausalLM) -> Iterator[None]:
    """While the context lasts, the layers with rounded weights round what they read to 8 bits."""
    hooks = [layer.register_forward_pre_hook(_round_input) for layer in _rounded_layers(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Effect:
    """The checkpoint as it was trained, on one text; made before :func:`round_weights` changes the model.

    logits: fp32 [L, vocab] of every position; trace: its routes.
    """

    def __init__(self, model: CausalLM, ids: Array) -> None:
        self.model, self.ids, self.trace = model, ids, Trace()
        self.logits = self._run(self.trace)

    def _run(self, trace: Trace | None = None) -> Array:
        with torch.no_grad():
            return np.asarray(self.model(torch.from_numpy(self.ids[None].astype(np.int64)), trace)[0].numpy())

    def judge(self, shown: Probe) -> tuple[dict[str, Any], dict[str, Any]]:
        """Run the shipped graph (first a block and a token in one call, then one by one) and compare.

        shown: the graph with its own choices shown, not forced. Returns (activations, effect): the first is a judgement of the
        file against the model, whose weights must be rounded by now, the second a report against the checkpoint as trained.
        """
        prompt = self.model.config.routing.block_size + 1
        got, routes = _feed(self.model, shown, self.ids, prompt)
        rows = slice(prompt - 1, len(self.ids))
        reference = self._run()[rows]
        with rounded_activations(self.model):
            emulated = divergence(reference, self._run()[rows]).mean()
        kl = divergence(reference, got).mean()
        limit = max(KL_LIMIT, ALLOWED_FACTOR * float(emulated))
        activations = {
            "tokens": len(got),
            "kl_mean": float(kl),
            "pytorch_kl_mean": float(emulated),
            "limit": limit,
            "passed": bool(kl <= limit),
        }
        return activations, {**self._distribution(got, rows), "routes": self._routes(shown, routes)}

    def _distribution(self, got: Array, rows: slice) -> dict[str, Any]:
        before, target = self.logits[rows], torch.from_numpy(self.ids[rows][1:].astype(np.int64))
        kl = divergence(before, got)
        losses = [float(F.cross_entropy(torch.from_numpy(logits[:-1]).double(), target)) for logits in (before, got)]
        return {
            "tokens": len(got),
            "kl_mean": float(kl.mean()),
            "top1_agreement": float((before.argmax(-1) == got.argmax(-1)).mean()),
            "loss_before": losses[0],
            "loss_after": losses[1],
        }

    def _routes(self, shown: Probe, routes: dict[str, Array]) -> list[dict[str, Any]]:
        """Per router: choices compared, share of equal sets, mean Jaccard."""
        table = []
        for step in routed_steps(self.model.config, shown.nodes):
            if not step.node.selected:
                continue
            before = chosen(step, self.trace)[0].numpy()
            after = routes[step.node.outputs[0]]
            options = int(max(before.max(), after.max())) + 1
            stats = Selection(step.label)
            count_equal(stats, *(as_set(x, options).reshape(-1, options) for x in (before, after)))
            table.append(
                {
                    "name": step.label,
                    "rows": stats.rows,
                    "exact_rate": stats.exact / stats.rows,
                    "jaccard": stats.jaccard_sum / stats.rows,
                }
            )
        return table


def _feed(model: CausalLM, shown: Probe, ids: Array, prompt: int) -> tuple[Array, dict[str, Array]]:
    """Logits [L - prompt + 1, vocab] of the graph's calls and each router's choices over the whole text."""
    size = model.config.routing.block_size
    names = [node.outputs[0] for node in shown.nodes if node.selected]
    axes = {node.outputs[0]: 0 if node.op_type == "ExpertRoute" else 2 for node in shown.nodes if node.selected}
    device = Device(shown.session, model, -(-len(ids) // size) * size, show=names)
    logits, pieces = [], []
    for call in (ids[:prompt], *ids[prompt:, None]):
        logits.append(device.feed(call))
        pieces.append(device.shown)
    return np.stack(logits), {name: np.concatenate([piece[name] for piece in pieces], axis) for name, axis in axes.items()}
