"""The C++ plugins in the registry of TensorRT 11's lean runtime, which runs engines and builds none."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bilevel import contract
from tests import ROOT
from tests.doubles.gpu import request_of
from tests.plugins.tensorrt.plugin_library import build_plugins
from tests.support.operator_calls import make_call

if importlib.util.find_spec("tensorrt_lean") is None:
    pytest.skip("there is no lean TensorRT for this machine", allow_module_level=True)

# In a process of its own: libraries stay in a registry for good.
PROGRAM = """
import json, sys
import tensorrt_lean as trt
from bilevel import contract
from bilevel.plugins.tensorrt.fields import Field, PluginNode, write_fields
from bilevel.plugins.tensorrt.python import Fields

registry = trt.get_plugin_registry()
assert registry.load_library(sys.argv[1]) is not None
found = {}
for op, attributes, dims in json.loads(sys.argv[2]):
    creator = registry.get_creator(op, str(contract.VERSION), contract.DOMAIN)
    dtype = "float32" if contract.BY_NAME[op].has_float_type else ""
    fields = write_fields(PluginNode(contract.BY_NAME[op], attributes, dtype, tuple(map(tuple, dims))))
    good, newer = Fields(trt, fields), Fields(trt, [Field("format_version", "INT32", (3,)), *fields[1:]])
    made = creator.create_plugin(op, good.collection, trt.TensorRTPhase.RUNTIME)
    refused = creator.create_plugin(op, newer.collection, trt.TensorRTPhase.RUNTIME)
    found[op] = [[field.name for field in creator.field_names], made is not None, refused is None]
print(json.dumps(found))
"""


def test_creators_are_listed_and_make_plugins_out_of_a_plan(tmp_path: Path) -> None:
    calls = {op.name: make_call(op.name) for op in contract.GPU_OPS}
    library = build_plugins([request_of(name, *call) for name, call in calls.items()], tmp_path / "library.so")
    given = [(name, attributes, [list(x.shape) for x in inputs.values()]) for name, (inputs, attributes) in calls.items()]
    command = [sys.executable, "-c", PROGRAM, str(library), json.dumps(given)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    expected = {op.name: [[attribute.name for attribute in op.attributes], True, True] for op in contract.GPU_OPS}
    assert json.loads(run.stdout) == expected
    assert run.stderr.count("format version 3, this library reads 2") == len(contract.GPU_OPS)
