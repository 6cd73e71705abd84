"""One side of a measurement, the routed graph or its dense twin: filled caches, timed steps, logits to compare, memory.

What is timed is the runtime's own loop (``bilevel.runtime.generate.generator``): token selection and text included.
"""

from __future__ import annotations

import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.bundle.cache_rows import BIAS, CacheRows
from bilevel.bundle.format import load_bundle
from bilevel.bundle.tensors import decode, encode
from bilevel.errors import BundleError
from bilevel.runtime.backend.onnx import OnnxSession
from bilevel.runtime.bench.profile import read_profile
from bilevel.runtime.generate.generator import Generation
from bilevel.runtime.generate.rows import Row
from bilevel.runtime.generate.sampling import Sampler, SamplingParams
from bilevel.runtime.generate.text import BundleTokenizer, TextAssembler

# What is filled at a time: temporary numbers shall not count as the memory of a side.
_BLOCKS_AT_ONCE, _ROWS_AT_ONCE = 64, 4096


@dataclass(frozen=True)
class SideSpec:
    """Which graph to open and for how many tokens. capacity: a multiple of the block size. profile: record every node."""

    bundle: Path
    is_twin: bool
    threads: int
    capacity: int
    profile: bool = False


class Side:
    """An opened graph with caches for one row. Every method is called through ``worker.Worker``."""

    def __init__(self, spec: SideSpec) -> None:
        self.spec = spec
        bundle = load_bundle(spec.bundle, verify=False)
        self.bundle = bundle.dense_twin() if spec.is_twin else bundle
        self._folder = tempfile.TemporaryDirectory(prefix="bilevel-bench-") if spec.profile else None
        prefix = Path(self._folder.name) / "profile" if self._folder else None
        self._session = OnnxSession(self.bundle, spec.threads, prefix)
        self._engine = self._session.time_calls()
        self._caches = self._session.allocate(1, spec.capacity)
        self._tokenizer = BundleTokenizer(bundle.tokenizer_path)
        self._generation: Generation | None = None

    def cpu_library(self) -> str | None:
        """The routed operators' CPU library that this side uses, None where the portable bodies run."""
        library = self._session.cpu_library
        return None if library is None else str(library)

    def fill(self, context: int, seed: int) -> None:
        """Fill the caches as if ``context`` tokens had been read; the next decode continues there.

        Keys and values are normal numbers (the twin's int8 caches: any numbers), block keys their fp32 means, tokens random.
        Level 1's block descriptors are random vectors of length 1, not those of the tokens: which blocks become candidates
        differs, what they cost does not. Blocks that later calls touch are computed by the graph.
        """
        random = np.random.default_rng(seed)
        state, size = self._caches.state, self.bundle.block_size
        dtypes = {spec.name: spec.dtype for spec, _ in self.bundle.graph.state}
        for name, cache in state.items():
            kind = name.split(".")[1]
            if kind in ("key", "value") and dtypes[name] == "uint8":
                _fill_packed(random, cache, context, self._rows(cache))
            elif kind in ("key", "value"):
                _fill_vectors(random, cache, context, dtypes[name])
            elif kind == "token_ids":
                cache[:, :context] = random.integers(0, self.bundle.vocab_size, (1, context))
            elif kind == "word_block_key":
                vectors = random.standard_normal(cache.shape, dtype=np.float32)
                cache[:] = encode(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), dtypes[name])
            elif kind != "block_key":
                raise BundleError(f"bilevel bench cannot fill the cache {name}; measure with a bundle of this bilevel's export")
        for name, cache in state.items():
            if name.split(".")[1] == "block_key":
                past = name.replace("block_key", "key")
                for head, blocks in enumerate(cache[0]):
                    stored = state[past][0, head].reshape(len(blocks), size, -1)
                    for first in range(0, len(blocks), _BLOCKS_AT_ONCE):
                        piece = slice(first, first + _BLOCKS_AT_ONCE)
                        keys = self._numbers(stored[piece], dtypes[past])
                        blocks[piece] = encode(self._pooled(keys, random), dtypes[name])
        self._generation = self._start([*[0] * context, int(random.integers(self.bundle.vocab_size))], context)

    def _rows(self, cache: NDArray[Any]) -> CacheRows:
        """The layout of a packed cache's rows."""
        return CacheRows.of_bytes(cache.shape[-1], int(self.bundle.config["head_dim"]))

    def _numbers(self, stored: NDArray[Any], dtype: str) -> NDArray[np.float32]:
        """The keys [..., D] that a cache holds."""
        return self._rows(stored).unpack(stored) if dtype == "uint8" else decode(stored, dtype)

    def _pooled(self, blocks: NDArray[np.float32], random: np.random.Generator) -> NDArray[np.float32]:
        """The blocks' keys [N, Dr] of keys [N, R, D]; a gate's are random, as its projection is in the graph alone."""
        kind = (self.bundle.config.get("routing") or {}).get("key", "mean")
        if kind == "bounds":
            return np.concatenate([blocks.max(1), blocks.min(1)], axis=-1)
        return blocks.mean(1) if kind == "mean" else random.standard_normal(blocks[:, 0].shape, dtype=np.float32)

    def _start(self, prompt: list[int], num_cached: int) -> Generation:
        """A generation of one row, of whose prompt ``num_cached`` tokens count as read."""
        start, params = time.perf_counter(), SamplingParams(max_tokens=self.spec.capacity)
        row = Row(0, prompt, Sampler(params, self.bundle.vocab_size), (), self.spec.capacity)
        row.num_cached = num_cached
        return Generation([row], [TextAssembler(self._tokenizer)], self._caches, self.bundle.prefill_chunk, start)

    def decode(self, steps: int) -> list[tuple[float, float]]:
        """Generate ``steps`` tokens behind what is cached: (seconds, of which inside ONNX Runtime) of each."""
        assert self._generation is not None
        times = []
        for _ in range(steps):
            before, start = self._engine.seconds, time.perf_counter()
            next(self._generation)
            times.append((time.perf_counter() - start, self._engine.seconds - before))
        return times

    def prefill(self, tokens: list[int]) -> dict[str, float]:
        """Read ``tokens`` from nothing, in the bundle's chunks, and choose one token."""
        before, generation = self._engine.seconds, self._start(tokens, 0)
        next(generation)
        first = generation.stats.first_token_seconds
        assert first is not None
        return {"seconds": first, "engine_seconds": self._engine.seconds - before}

    def logits(self, tokens: list[int], past: int, chunk: int) -> NDArray[np.float32]:
        """Logits [vocab] after reading ``tokens`` behind ``past`` cached ones, ``chunk`` at a time. Decode is not disturbed."""
        result = np.zeros(0, np.float32)
        for first in range(0, len(tokens), chunk):
            piece = np.array([tokens[first : first + chunk]], np.int64)
            lengths = np.array([past + first], np.int32), np.array([piece.shape[1]], np.int32)
            result = self._caches.run(piece, *lengths)[0].copy()
        return result

    def peak_memory(self) -> int:
        """Most bytes that this process had resident since it started (Linux: VmHWM)."""
        try:
            for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        except OSError:
            pass
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def state_bytes(self) -> int:
        """Bytes of the caches."""
        return self.bundle.state_bytes(1, self.spec.capacity)

    def end_profiling(self, discard: int) -> list[dict[str, float]]:
        """Seconds by part (``profile``) of every call but the first ``discard``."""
        path = self._session.end_profiling()
        return read_profile(path)[discard:]


def _fill_packed(random: np.random.Generator, cache: NDArray[Any], context: int, rows: CacheRows) -> None:
    """The same in a packed cache [1, H, M, C], with one scale that the largest of a row's numbers needs about."""
    half = 2 ** (rows.bits - 1)
    mantissa, exponent = 255, BIAS - (13 if rows.bits == 8 else 9)
    scale = np.float32(mantissa * 2.0 ** (exponent - BIAS))
    for head in cache[0, :, :context]:
        for row in (head[first : first + _ROWS_AT_ONCE] for first in range(0, context, _ROWS_AT_ONCE)):
            numbers = random.standard_normal((len(row), rows.width), dtype=np.float32)
            codes = np.clip(np.rint(numbers / scale), 1 - half, half - 1).astype(np.int16) + half
            if rows.bits == 4:
                lower, upper = np.split(codes.reshape(len(row), rows.groups, -1), 2, axis=-1)
                codes = (lower | upper << 4).reshape(len(row), -1)
            row[:, : codes.shape[1]] = codes
            row[:, codes.shape[1] :: 2], row[:, codes.shape[1] + 1 :: 2] = mantissa, exponent


def _fill_vectors(random: np.random.Generator, cache: NDArray[Any], context: int, dtype: str) -> None:
    """Random numbers in the first ``context`` tokens of a cache [1, H, M, D], without a second copy of it."""
    for vectors in cache[0, :, :context]:
        if dtype == "float32":
            random.standard_normal(out=vectors, dtype=np.float32)
        elif dtype == "int8":
            vectors[:] = random.integers(-127, 128, vectors.shape, np.int8)
        else:
            vectors[:] = encode(random.standard_normal(vectors.shape, dtype=np.float32), dtype)
