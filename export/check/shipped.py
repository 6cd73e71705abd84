"""The shipped graph as a device runs it: on its own, with its own choices, caches carried from call to call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from bilevel.config import ModelConfig
from bilevel.contract import DOMAIN
from bilevel.export.check.adapt import TYPES, float_ports, load_adapted
from bilevel.export.check.graph_parts import SELECTIONS
from bilevel.export.check.judge import Array
from bilevel.export.check.layered import Text
from bilevel.export.check.structure import expected_nodes
from bilevel.export.decoder.decoder import state_tensors
from bilevel.export.graph.sessions import Arrays, open_session, run_session
from bilevel.model import hidden_name
from bilevel.state import Trace


class ShippedGraph:
    """A session over the graph at ``path``. Numbers of a lower precision go in and come out as fp32.

    precision, caches: the bundle's; bf16 is emulated, because ONNX Runtime's CPU provider has no kernels for it.
    fp32_activations: products with int8 or int4 weights do not round their activations. library: CPU kernels, or None for the
    portable bodies. After each call ``hidden`` holds the hidden state [B, L, d] behind the last layer and ``routes`` every
    router's choices by name.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        precision: str = "float32",
        *,
        caches: str = "fp32",
        fp32_activations: bool = True,
        library: Path | None = None,
    ) -> None:
        self.config = config
        model = load_adapted(path, precision, emulated=precision == "bfloat16", fp32_activations=fp32_activations)
        values = ir.convenience.create_value_mapping(model.graph)
        self._last = hidden_name(config.num_hidden_layers)
        values[self._last].type = ir.TensorType(TYPES[precision])
        routers = [node.outputs[0] for node in model.graph if node.domain == DOMAIN and node.op_type in SELECTIONS]
        self._routers = [value.name or "" for value in routers]
        for value in [values[self._last], *routers]:
            value.type = value.type or ir.TensorType(ir.DataType.INT32)
            if not value.is_graph_output():
                model.graph.outputs.append(value)
        float_ports(model.graph)
        # The CPU library's kernels are fp32, so that native fp16 runs the bodies.
        usable = None if precision == "float16" else library
        self._session = open_session(path, ir.to_proto(model).SerializeToString(), usable)
        self._tensors = state_tensors(config, caches=caches)
        self.hidden: Array = np.zeros(0, np.float32)
        self.routes: dict[str, Array] = {}
        self.caches: Arrays = {}

    def start(self, rows: int, capacity: int) -> None:
        """Empty caches for ``rows`` rows of ``capacity`` tokens (whole blocks)."""
        sizes = {"batch": rows, "capacity": capacity, "num_blocks": capacity // self.config.routing.block_size}
        self.caches = {
            f"past.{t.name}": torch.zeros([sizes[s] if isinstance(s, str) else s for s in t.shape], dtype=t.dtype).numpy()
            for t in self._tensors
        }

    def feed(self, ids: Array, past: Array, new: Array) -> Array:
        """One call: logits [B, vocab] of each row's last valid token. ids: [B, L], past, new: [B]."""
        feeds: Arrays = {"input_ids": ids.astype(np.int64), "past_len": past.astype(np.int32), "new_len": new.astype(np.int32)}
        outputs = ["logits", self._last, *(f"present.{t.name}" for t in self._tensors), *self._routers]
        logits, self.hidden, *rest = run_session(self._session, outputs, {**feeds, **self.caches})
        self.caches = {f"past.{t.name}": cache for t, cache in zip(self._tensors, rest, strict=False)}
        self.routes = dict(zip(self._routers, rest[len(self._tensors) :], strict=True))
        return np.asarray(logits)

    def read(self, text: Text) -> tuple[list[Array], dict[str, list[Array]]]:
        """The hidden states [B, L, d] behind the last layer and the routers' choices of every call of ``text``."""
        self.start(len(text.ids), text.capacity)
        hidden: list[Array] = []
        routes: dict[str, list[Array]] = {name: [] for name in self._routers}
        for call in text.calls:
            self.feed(call.ids, call.past, call.new)
            hidden.append(self.hidden)
            for name, choice in self.routes.items():
                routes[name].append(choice)
        return hidden, routes

    def choices(self, routes: dict[str, list[Array]]) -> list[list[Trace]]:
        """The choices of :meth:`read` as PyTorch can obey them: per part (level 1, then every layer) a trace per call."""
        routers = [(op, layer) for _, op, layer in expected_nodes(self.config) if op in SELECTIONS]
        count = len(next(iter(routes.values()), []))
        parts = [[Trace() for _ in range(count)] for _ in range(self.config.num_hidden_layers + 1)]
        for (op, layer), calls in zip(routers, routes.values(), strict=True):
            for trace, choice in zip(parts[0 if layer is None else layer + 1], calls, strict=True):
                tensor = torch.from_numpy(choice)
                if layer is None:
                    trace.candidates = tensor
                else:
                    (trace.expert_ids if op == "ExpertRoute" else trace.routes).append(tensor)
        return parts

    def last_logits(self, ids: Array, sizes: Sequence[int]) -> Array:
        """Logits [vocab] after ``ids`` [L], read in calls of the given sizes, the rest in one."""
        text = Text.cut(ids[None], np.array([len(ids)]), sizes, self.config.routing.block_size)
        self.start(1, text.capacity)
        logits = np.zeros((1, 0), np.float32)
        for call in text.calls:
            logits = self.feed(call.ids, call.past, call.new)
        return np.asarray(logits[0])

    def continue_greedily(self, prompts: Sequence[Array], count: int, longest: int) -> list[Array]:
        """``count`` tokens behind each prompt, each the best of its logits; the prompts are read in calls of ``longest``."""
        rows, lengths = len(prompts), np.array([len(prompt) for prompt in prompts])
        ids = np.zeros((rows, int(lengths.max())), np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        size = self.config.routing.block_size
        # Room for a row of any length to idle behind its own tokens while a longer prompt is read.
        self.start(rows, -(-(ids.shape[1] + max(count, longest)) // size) * size)
        best = np.zeros(rows, np.int64)
        for first in range(0, ids.shape[1], longest):
            piece = ids[:, first : first + longest]
            new = np.clip(lengths - first, 0, piece.shape[1])
            # A row that has been read goes on idle; its padding is written behind its own tokens and overwritten later.
            logits = self.feed(piece, np.minimum(lengths, first), new)
            best = np.where(new > 0, logits.argmax(-1), best)
        generated = [best]
        for step in range(count - 1):
            logits = self.feed(best[:, None], lengths + step, np.ones(rows, np.int32))
            best = logits.argmax(-1)
            generated.append(best)
        return list(np.stack(generated, axis=1))
