"""``bilevel kernels``: a real build for a bundle, for this machine and for a board."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from bilevel import contract
from bilevel.errors import ContractError
from bilevel.export.cli.kernels import LIBRARY, parse_architectures
from bilevel.plugins.launch.tiles import ARCHITECTURES
from bilevel.plugins.library.gpu import DeviceTensor, KernelCall, KernelLibrary, needed_versions, read_info
from bilevel.plugins.tensorrt.headers import find_headers
from tests import ROOT

CROSS = ("aarch64-linux-gnu-g++", "qemu-aarch64")
SYSROOT = Path("/usr/aarch64-linux-gnu")
# Loads a library as a board would, with every symbol bound, and prints what it holds.
LOADER = """
#include <dlfcn.h>
#include <stdio.h>
int main(int count, char** arguments) {
  void* library = dlopen(arguments[count - 1], RTLD_NOW);
  if (!library) return puts(dlerror()), 1;
  const char* (*info)(void) = (const char* (*)(void))dlsym(library, "bilevel_library_info");
  int (*launch)(const void*, void*, unsigned long, void*) = (int (*)(const void*, void*, unsigned long, void*))dlsym(
      library, "bilevel_launch");
  const char* (*error)(void) = (const char* (*)(void))dlsym(library, "bilevel_last_error");
  puts(info());
  return launch(0, 0, 0, 0) == 1 && puts(error()) >= 0 ? 0 : 1;
}
"""


def kernels(*arguments: object, cache: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """A run of the command in a process in which Triton compiles."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bilevel.runtime.cli.main", "kernels", *map(str, arguments)]
    run = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == status, run.stderr
    return run


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def bundle(exported: Callable[..., tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(exported("moba", "fp32", "fp16")[1], tmp_path_factory.mktemp("kernels") / "bundle")


def test_build_and_show(bundle: Path, cache: Path) -> None:
    made = json.loads(kernels("build", "--geometry", bundle, "--arch", "sm_87", "--json", cache=cache).stdout)
    path = bundle / "kernels" / platform.machine() / LIBRARY
    assert made["path"] == str(path) and made["architectures"] == {"87": "12.6"}
    assert 10_000 < made["code_bytes"] < made["bytes"] == path.stat().st_size
    library = KernelLibrary(path)
    assert library.info == read_info(path) and set(library.info) <= set(made)
    assert [variant["op"] for variant in library.info["variants"]] == ["CoarseRoute", "RoutedAttention", "WriteCache"]
    text = kernels("show", path, cache=cache).stdout
    assert text.startswith(f"for {platform.machine()} with GLIBC 2.") and "sm_87 (CUDA 12.6)" in text
    assert "RoutedAttention  float16   D=8 Dv=8 Hkv=2 Hq=4" in text

    def tensor(dtype: str, *shape: int) -> DeviceTensor:
        return DeviceTensor(0, shape, dtype)

    cached = tensor("float16", 1, 2, 64, 8)
    q, lengths = tensor("float16", 1, 4, 16, 8), tensor("int32", 1)
    inputs = [q, cached, cached, tensor("int32", 1, 4, 16, 3), lengths, lengths]
    call = KernelCall(contract.ROUTED_ATTENTION, inputs, [q], {"block_size": 4, "causal": 1, "scale": 0.5})
    assert library.workspace_size(call) == library.workspace_size(call, 87) > 0


def test_no_path_of_the_building_machine_is_left_in_it(bundle: Path, cache: Path) -> None:
    kernels("build", "--geometry", bundle, "--arch", "87", "--out", bundle / "again.so", cache=cache)
    content = (bundle / "again.so").read_bytes()
    assert str(ROOT).encode() not in content and str(bundle).encode() not in content and b"triton_" not in content


@pytest.mark.thorough
def test_two_bundles_share_a_library(bundle: Path, cache: Path) -> None:
    """The same bundle twice needs nothing more."""
    arguments = ("--geometry", bundle, "--geometry", bundle, "--arch", "87", "--out", bundle / "both.so", "--json")
    assert len(json.loads(kernels("build", *arguments, cache=cache).stdout)["variants"]) == 3


@pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in CROSS), reason="needs Debian's g++-aarch64-linux-gnu and qemu-user"
)
def test_a_library_for_a_board(bundle: Path, cache: Path, tmp_path: Path) -> None:
    """Orin's and Thor's code in a library for aarch64, loaded by an emulated one; JetPack 6 has glibc 2.35."""
    kernels("build", "--geometry", bundle, "--arch", "sm_87,sm_110", "--target", "aarch64", cache=cache)
    path = bundle / "kernels" / "aarch64" / LIBRARY
    assert read_info(path)["target"] == "aarch64" and set(read_info(path)["architectures"]) == {"87", "110"}
    needed = {name: [int(part) for part in version.split(".")] for name, version in needed_versions(path).items()}
    assert needed["GLIBC"] <= [2, 35] and needed["GLIBCXX"] <= [3, 4, 30]
    (tmp_path / "loader.c").write_text(LOADER)
    subprocess.run(["aarch64-linux-gnu-gcc", tmp_path / "loader.c", "-o", tmp_path / "loader", "-ldl"], check=True)
    command = ["qemu-aarch64", "-L", str(SYSROOT), str(tmp_path / "loader"), str(path)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert json.loads(lines[0]) == read_info(path) and lines[1] == "the call is NULL"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["build", "--arch", "87"], "build takes the bundle as an option: bilevel kernels build --geometry BUNDLE"),
        (["build", "--geometry", "no-such", "--arch", "87"], "no-such is not a bundle .*; make one: bilevel export"),
        (["build", "--geometry", "{bundle}"], "--arch .nothing. must list architectures such as sm_87,sm_90; there are sm_80,"),
        (["build", "--geometry", "{bundle}", "--arch", "sm_75"], "no architecture sm_75; take one of sm_80"),
        (
            ["build", "--geometry", "{bundle}", "--arch", "110", "--cuda", "12"],
            "CUDA 12 knows no sm_110; build it with --cuda 13",
        ),
        (["build", "--geometry", "{bundle}", "--arch", "87", "--jobs", "-1"], "--jobs -1 must be at least 0"),
        (["show"], "show takes a library and nothing else"),
        (["show", "no-such.so"], "no-such.so cannot be read .No such file.*; build one: bilevel kernels build"),
        (["show", "README.md"], "README.md is no kernel library; build one"),
    ],
)
def test_what_cannot_be_done_is_said(arguments: list[str], message: str, bundle: Path, cache: Path) -> None:
    filled = [argument.format(bundle=bundle) for argument in arguments]
    said = kernels(*filled, cache=cache, status=2).stderr
    assert re.search(message, said) and said.count("\n") == 1, said


def test_a_graph_without_nodes_and_caches_needs_no_kernels(bundle: Path, cache: Path, tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "g", [value], [onnx.ValueInfoProto(name="y")])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    shutil.copy(bundle / "bundle.json", tmp_path)
    said = kernels("build", "--geometry", tmp_path, "--arch", "87", cache=cache, status=2).stderr
    assert "has no routed nodes and no caches, so it needs no kernels; run it as it is" in said


def test_architectures_as_people_write_them() -> None:
    assert parse_architectures("sm_90, 87,sm_87") == [87, 90] and parse_architectures("all") == list(ARCHITECTURES)
    with pytest.raises(ContractError, match="--arch sm_9o must list"):
        parse_architectures("sm_9o")


# Calls the plugin library as TensorRT does when it loads one, and prints its creators.
LISTER = """
#include <dlfcn.h>
#include <cstdio>
#include "NvInferRuntime.h"
int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  using Get = nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&);
  const auto get = library == nullptr ? nullptr : reinterpret_cast<Get>(dlsym(library, "getCreators"));
  if (get == nullptr) return std::puts(dlerror()), 1;
  int32_t count = 0;
  const auto creators = get(count);
  for (int32_t i = 0; i < count; ++i) {
    const auto creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]);
    const auto kind = creator->getInterfaceInfo();
    std::printf("%s %s %s %s\\n", kind.kind, creator->getPluginNamespace(), creator->getPluginName(),
                creator->getPluginVersion());
  }
}
"""


@pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in CROSS), reason="needs Debian's g++-aarch64-linux-gnu and qemu-user"
)
@pytest.mark.skipif(isinstance(find_headers(), str), reason=f"no TensorRT plugins: {find_headers()}")
def test_the_creators_of_a_boards_library(bundle: Path, cache: Path, tmp_path: Path) -> None:
    arguments = ("--geometry", bundle, "--arch", "sm_87", "--target", "aarch64", "--tensorrt", "required")
    kernels("build", *arguments, "--out", tmp_path / LIBRARY, cache=cache)
    (tmp_path / "lister.cpp").write_text(LISTER)
    headers = find_headers()
    assert not isinstance(headers, str)
    folders = [f"-isystem{folder}" for folder in headers.include_dirs]
    compiler = ["aarch64-linux-gnu-g++", "-std=c++17", *folders, tmp_path / "lister.cpp", "-o", tmp_path / "lister", "-ldl"]
    subprocess.run(compiler, check=True)
    command = ["qemu-aarch64", "-L", str(SYSROOT), str(tmp_path / "lister"), str(tmp_path / LIBRARY)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert lines == [f"PLUGIN CREATOR_V3ONE bilevel {op.name} {op.version}" for op in contract.GPU_OPS]
