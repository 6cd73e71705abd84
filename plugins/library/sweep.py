"""Compile a spread of variants for every architecture and hold their shared memory against the limit and the estimate.

    python -m bilevel.plugins.library.sweep [--arch sm_87,sm_90] [--dtype float16,float32] [--op RoutedAttention]

Needs no GPU; all of it takes about half an hour on one core.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

from bilevel import contract
from bilevel.plugins.launch.launches import Launch
from bilevel.plugins.launch.plans import plans
from bilevel.plugins.launch.tiles import ARCHITECTURES, shared_limit
from bilevel.plugins.library.compile import compile_launch

# (Hr, Hk, Hs, Dr, block_size, K): grouped heads, level 1 on word embeddings, one choice per head, head groups that do not nest.
_ROUTES = [
    (32, 8, 8, 128, 64, 16),
    (1, 1, 1, 768, 64, 32),
    (16, 2, 16, 64, 16, 128),
    (16, 1, 1, 256, 128, 64),
    (12, 4, 6, 80, 48, 24),
]
# (Hs, block_size, K, scored, init, local, partial): a MiniMax-M3, an InfLLM-V2, regions of an image, a window with a sink.
_SELECTIONS = [(4, 128, 16, 16, 0, 1, 0), (2, 64, 96, 96, 1, 33, 0), (1, 64, 4, 4, 0, 0, 1), (8, 16, 128, 0, 4, 64, 2)]
# (Hq, Hkv, Hs, D, block_size, K)
_ATTENTION = [
    (32, 8, 8, 128, 64, 16),
    (16, 1, 16, 32, 16, 128),
    (16, 1, 1, 256, 128, 64),
    (8, 8, 1, 96, 32, 8),
    (64, 4, 4, 256, 64, 16),
    (12, 4, 6, 80, 48, 24),
    (4, 2, 2, 64, 5, 4),
]
# (H, W): keys and values, their blocks' keys, level 1's
_CACHES = [(8, 128), (2, 80), (1, 2560)]
# (E, Gp, topk_group, k, d, f)
_EXPERTS = [(256, 8, 4, 8, 7168, 2048), (64, 1, 1, 6, 2048, 1408), (8, 2, 1, 2, 96, 80), (1000, 10, 3, 16, 1024, 256)]


def geometries(op: str) -> Iterator[dict[str, Any]]:
    """The spread of geometries of one operator."""
    if op in ("CoarseRoute", "FineRoute"):
        for n, (heads, key_heads, choices, width, block_size, topk) in enumerate(_ROUTES):
            route = {"Hr": heads, "Hk": key_heads, "Dr": width, "num_selection_heads": choices, "topk": topk}
            route |= {"block_size": block_size, "init_blocks": n % 3, "local_blocks": 1 + n % 2, "causal": int(n != 2)}
            yield route if op == "CoarseRoute" else {**route, "Hc": 1, "K1": 2 * topk}
    elif op == "SelectBlocks":
        for n, (choices, block_size, topk, scored, init, local, partial) in enumerate(_SELECTIONS):
            budget = {"Hs": choices, "block_size": block_size, "topk": topk, "scored_topk": scored, "causal": int(n != 2)}
            yield {**budget, "init_blocks": init, "local_blocks": local, "partial_block": partial}
    elif op == "RoutedAttention":
        for n, (heads, kv_heads, choices, width, block_size, topk) in enumerate(_ATTENTION):
            values = width // 2 if n % 2 else width
            sizes = {"Hq": heads, "Hkv": kv_heads, "Hs": choices, "D": width, "Dv": values, "K": topk}
            yield {**sizes, "block_size": block_size, "causal": int(n != 2), "scale": width**-0.5}
    elif op == "WriteCache":
        yield from ({"H": heads, "W": width} for heads, width in _CACHES)
    else:
        for n, (experts, groups, topk_group, topk, width, inner) in enumerate(_EXPERTS):
            if op == "ExpertRoute":
                names = {"score_func": contract.SCORE_FUNCS[n % 3], "group_score": ("max", "top2_sum", "external")[n % 3]}
                yield {
                    "E": experts,
                    "Gp": groups,
                    "top_k": topk,
                    "topk_group": topk_group,
                    "normalize": 1,
                    "scale": 2.5,
                    "norm_floor": 0.0,
                    "zero_fill": n % 2,
                    **names,
                }
            else:
                yield {"E": experts, "k": topk, "d": width, "f": inner, "gate_scale": 1.0, "limit": 0.0, "up_shift": 0.0}


def variants(op: str, dtype: str, arch: int) -> list[Launch]:
    """Every launch of the spread, each once."""
    launches = [
        launch
        for geometry in geometries(op)
        for plan in plans(contract.BY_NAME[op], geometry, dtype, arch)
        for launch in plan.launches
    ]
    return [launch for n, launch in enumerate(launches) if launch not in launches[:n]]


def main(arguments: list[str] | None = None) -> int:
    """Compile the spread, print a line for every architecture, type and operator; 1 where a variant is over its limit."""
    parser = argparse.ArgumentParser(prog="python -m bilevel.plugins.library.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default=",".join(f"sm_{arch}" for arch in ARCHITECTURES))
    parser.add_argument("--dtype", default=",".join(contract.FLOAT_TYPES))
    parser.add_argument("--op", default=",".join(op.name for op in contract.GPU_OPS))
    parser.add_argument("--verbose", action="store_true", help="a line for every kernel")
    options = parser.parse_args(arguments)
    over = count = 0
    for arch in (int(name.removeprefix("sm_")) for name in options.arch.split(",")):
        for dtype in options.dtype.split(","):
            for op in options.op.split(","):
                start, worst, size = time.monotonic(), (0.0, 0, ""), 0
                launches = variants(op, dtype, arch)
                for launch in launches:
                    compiled = compile_launch(launch, arch)
                    over += compiled.shared > launch.tile.shared
                    worst = max(worst, (compiled.shared / launch.tile.shared, compiled.shared, launch.kernel))
                    size += len(compiled.cubin)
                    if options.verbose:
                        print(
                            f"  {launch.kernel}: {compiled.shared} of {launch.tile.shared} estimated; {dict(launch.constants)}"
                        )
                count += len(launches)
                print(
                    f"sm_{arch} {dtype} {op}: {len(launches)} kernels, {size / 1e6:.1f} MB, at most {worst[0]:.0%} of the "
                    f"estimate ({worst[2]}, {worst[1]} bytes; limit {shared_limit(arch)}), {time.monotonic() - start:.0f} s",
                    flush=True,
                )
    print(f"{count} kernels compiled, {over} above their estimate of shared memory, none above its limit")
    return int(over > 0)


if __name__ == "__main__":
    sys.exit(main())
