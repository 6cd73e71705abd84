"""Engines for GPUs that are not there: the tests' way through TensorRT-RTX's parser and builder.

As a program (``python -m tests.export.engine.rtx_engines GRAPH NODES PLUGINS ROWS,CAPACITY,CHUNK,BLOCK SM,...``) it does the
same in a process of its own, whose plugin registry nobody else has touched. NODES: that must become plugins. PLUGINS: "none",
or the file of a plugin library. It prints what it built as JSON.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bilevel.export.engine.network import Limits, Network, add_profiles, parse_graph
from bilevel.export.engine.sampling import add_best_logits
from bilevel.export.engine.versions import Flavour, compute_capabilities, load_flavour
from tests import ROOT


def layer_kinds(parsed: Network) -> Counter[str]:
    """How many layers of which kind."""
    network = parsed.network
    return Counter(network.get_layer(index).type.name for index in range(network.num_layers))


def build(parsed: Network, limits: Limits, archs: Sequence[int]) -> bytes:
    """The plan for the architectures, with the two profiles of ``limits``."""
    config = parsed.builder.create_builder_config()
    add_profiles(parsed, config, limits)
    members = compute_capabilities(parsed.flavour)
    config.num_compute_capabilities = len(archs)
    for index, arch in enumerate(archs):
        config.set_compute_capability(members[arch], index)
    plan = parsed.builder.build_serialized_network(parsed.network, config)
    assert plan is not None, parsed.logger.messages
    return bytes(plan)


def in_process(graph: Path, nodes: int, plugins: str, limits: Limits, archs: Sequence[int]) -> dict[str, Any]:
    """Build in a new process; what it printed."""
    sizes = f"{limits.batch},{limits.capacity},{limits.chunk},{limits.block_size}"
    arguments = [str(graph), str(nodes), plugins, sizes, ",".join(map(str, archs))]
    command = [sys.executable, "-m", "tests.export.engine.rtx_engines", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return dict(json.loads(run.stdout))


def main(graph: str, nodes: str, plugins: str, sizes: str, archs: str) -> None:
    flavour: Flavour = load_flavour("tensorrt-rtx")
    if plugins != "none":
        assert flavour.trt.get_plugin_registry().load_library(plugins)
    parsed = parse_graph(flavour, Path(graph).read_bytes(), Path(graph), int(nodes))
    add_best_logits(parsed, 0)
    plan = build(parsed, Limits(*map(int, sizes.split(","))), [int(arch) for arch in archs.split(",")])
    digest = hashlib.sha256(plan).hexdigest()
    print(json.dumps({"layers": layer_kinds(parsed), "bytes": len(plan), "sha256": digest}))


if __name__ == "__main__":
    main(*sys.argv[1:])
