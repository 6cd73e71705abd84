"""What a router costs whose scores are computed outside: MatMul and SelectBlocks beside CoarseRoute, which does both.

    python examples/router_cost.py [--rounds 7] [--shapes 1x512,256x128]

In ONNX Runtime on one thread, 4 heads, blocks of 64, 16 kept: the graphs' portable bodies, and the CPU kernels. For the kernels
also the selection alone: SelectBlocks on given scores beside CoarseRoute on keys of one channel, whose scoring is next to
nothing. The best of several rounds, in which the candidates take turns. SHAPES: tokens of the call x blocks before them.
"""

import argparse
import sys
import time
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from bilevel import contract
from bilevel.export.graph.functions import attach_functions
from bilevel.export.graph.schemas import ONNX_OPSET, PLUGIN_NAMESPACE, register_schemas
from bilevel.export.graph.specialise import specialise_functions
from bilevel.plugins.library.cpu import find_cpu_library

HEADS, BLOCK, KEPT = 4, 64, 16
COMMON = {"block_size": BLOCK, "topk": KEPT, "init_blocks": 1, "local_blocks": 1, "causal": 1, PLUGIN_NAMESPACE: "bilevel"}
LENGTHS = ["past_len", "new_len"]
Feeds = dict[str, np.ndarray[Any, Any]]


def graph_of(kind: str, width: int) -> onnx.ModelProto:
    """kind: fused (CoarseRoute), scored (MatMul and SelectBlocks) or given (SelectBlocks alone)."""
    select = {"scored_topk": KEPT, "partial_block": 0, **COMMON}
    floats = {"query": ["B", HEADS, "L", width], "unit_key": ["B", HEADS, "U", width]}
    if kind == "fused":
        nodes = [helper.make_node("CoarseRoute", [*floats, *LENGTHS], ["routes"], num_selection_heads=HEADS, **COMMON)]
    else:
        nodes = [helper.make_node("SelectBlocks", ["scores", *LENGTHS], ["routes"], **select)]
    nodes[0].domain = contract.DOMAIN
    if kind == "scored":
        nodes.insert(0, helper.make_node("MatMul", ["query", "turned"], ["scores"]))
        nodes.insert(0, helper.make_node("Transpose", ["unit_key"], ["turned"], perm=[0, 1, 3, 2]))
    if kind == "given":
        floats = {"scores": ["B", HEADS, "L", "U"]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in floats.items()]
    inputs += [helper.make_tensor_value_info(name, TensorProto.INT32, ["B"]) for name in LENGTHS]
    outputs = [helper.make_tensor_value_info("routes", TensorProto.INT32, [None] * 4)]
    opsets = [helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(contract.DOMAIN, contract.VERSION)]
    register_schemas()
    graph = helper.make_graph(nodes, kind, inputs, outputs)
    return specialise_functions(attach_functions(helper.make_model(graph, opset_imports=opsets, ir_version=11)))


def runner(kind: str, width: int, tokens: int, blocks: int, with_library: bool) -> Any:
    """A function that runs one call."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if with_library:
        options.register_custom_ops_library(str(find_cpu_library()))
    session = ort.InferenceSession(graph_of(kind, width).SerializeToString(), options)
    random = np.random.default_rng(0)
    query, keys = (random.standard_normal((1, HEADS, n, width), dtype=np.float32) for n in (tokens, blocks))
    feeds: Feeds = {"query": query, "unit_key": keys} if kind != "given" else {"scores": query @ keys.swapaxes(2, 3)}
    feeds["past_len"], feeds["new_len"] = (np.array([n], np.int32) for n in (BLOCK * blocks - tokens - 1, tokens))
    return lambda: session.run(None, feeds)


def best_times(runs: dict[str, Any], rounds: int) -> dict[str, float]:
    """Milliseconds a call."""
    best = {name: float("inf") for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            count = max(1, int(0.03 / min(best[name] / 1e3, 0.01)))
            start = time.perf_counter()
            for _ in range(count):
                run()
            best[name] = min(best[name], (time.perf_counter() - start) / count * 1e3)
    return best


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Print a line for every shape; returns shape -> name -> milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shapes", default="1x512,1x2048,256x128,512x512")
    options = parser.parse_args(arguments)
    found = {}
    for shape in options.shapes.split(","):
        tokens, blocks = map(int, shape.split("x"))
        kinds = {"bodies fused": ("fused", 128, False), "bodies scored": ("scored", 128, False)}
        if find_cpu_library() is not None:
            kinds |= {"kernels fused": ("fused", 128, True), "kernels scored": ("scored", 128, True)}
            kinds |= {"choice fused": ("fused", 1, True), "choice given": ("given", 1, True)}
        runs = {name: runner(kind, width, tokens, blocks, library) for name, (kind, width, library) in kinds.items()}
        times = found[shape] = best_times(runs, options.rounds)
        parts = [f"{name} {times[name]:.3f} ms" for name in times]
        parts += [f"bodies {times['bodies scored'] / times['bodies fused']:.2f} times"]
        print(f"{tokens} tokens, {blocks} blocks: {', '.join(parts)}", flush=True)
    return found


if __name__ == "__main__":
    main()
    sys.exit(0)
