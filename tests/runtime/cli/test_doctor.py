"""``bilevel doctor``, and what it is made of: the machine, what can run a bundle, the choice among them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bilevel import machine as machine_module
from bilevel.bundle.format import read_manifest
from bilevel.errors import EngineError, KernelError, RequestError
from bilevel.machine import Gpu, Machine, find_jetpack, find_package, look
from bilevel.plugins.library.gpu import trust
from bilevel.runtime.backend.select import LIBRARY_VARIABLE, choose, find_library, library_places, list_options, open_session
from bilevel.runtime.cli import trials
from bilevel.runtime.cli.main import main
from bilevel.runtime.cli.trials import pair_problems
from tests import ROOT
from tests.doubles.bundle import write_bundle
from tests.doubles.gpu import fake_gpu
from tests.doubles.tensorrt import VERSION, FakeDevice, write_engine

ORIN = Machine(
    system="Linux",
    machine="aarch64",
    python="3.10.12",
    memory_bytes=8 << 30,
    gpus=(Gpu("Orin", 87, 8 << 30, True),),
    driver_cuda="12.6",
    driver_problem="",
    jetpack="JetPack 6.2",
    packages={"onnxruntime": "1.23.2", "tensorrt": VERSION, "tensorrt_rtx": None, "cuda.bindings": "12.9.0"},
)
INFO = {
    "library": "bilevel kernels",
    "abi": 1,
    "target": "aarch64",
    "architectures": {"87": "12.6"},
    "tensorrt": "10.3.0",
    "variants": [],
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "bundle").mkdir()
    return write_bundle(tmp_path / "bundle")


def write_library(path: Path, **changes: Any) -> Path:
    """A file with a kernel library's description in it, which is all that is read here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x7fELF" + json.dumps({**INFO, **changes}).encode() + b"\0")
    return path


def problem(bundle: Path, machine: Machine = ORIN, library: Path | None = None, **changes: Any) -> str:
    """Why the only engine of a bundle does not run."""
    write_engine(bundle, **changes)
    (option,) = [option for option in list_options(read_manifest(bundle), machine, library) if option.engine]
    return option.problem


def test_an_engine_that_fits_is_taken(bundle: Path) -> None:
    write_engine(bundle, "small", capacity=64)
    write_engine(bundle, "large", capacity=256)
    write_engine(bundle, "rtx", backend="tensorrt-rtx", architectures=[89])
    options = list_options(read_manifest(bundle), ORIN)
    assert [option.name for option in options][:3] == ["large", "small", "rtx"] and options[3].backend == "onnx"
    option, why = choose(options)
    assert (option.name, why) == ("large", "large")
    option, why = choose(options, "onnx")
    assert option.engine is None and why == "model.onnx in ONNX Runtime on the CPU"
    with pytest.raises(
        EngineError, match="nothing runs this bundle here: rtx: it was built for sm_89, this machine has sm_87 .Orin."
    ):
        choose(options, "tensorrt-rtx")


def test_what_stands_in_the_way_is_told(bundle: Path) -> None:
    (bundle / "engines").mkdir()
    (bundle / "engines" / "broken.json").write_text("{}")
    write_engine(bundle, "old", version="10.3.0")
    option, why = choose(list_options(read_manifest(bundle), ORIN))
    assert option.backend == "onnx" and "not old: it was built by tensorrt 10.3.0, installed is 11.4.0; build it anew" in why
    assert "broken.json is no engine's manifest" in why
    with pytest.raises(RequestError, match="there is no backend 'tpu'; take auto, onnx, onnx-cuda, tensorrt, tensorrt-rtx"):
        open_session(bundle, "tpu")
    with pytest.raises(
        EngineError, match="the bundle has no engine of tensorrt-rtx; build one: bilevel build BUNDLE --backend"
    ):
        choose([option], "tensorrt-rtx")


def no_driver() -> Machine:
    return replace(ORIN, gpus=(), driver_cuda=None, driver_problem="the CUDA driver libcuda.so.1 cannot be opened; install it")


@pytest.mark.parametrize(
    "machine, changes, expected",
    [
        (ORIN, {}, ""),
        (ORIN, {"platform": "x86_64"}, "it was built on x86_64, this machine is aarch64; build it anew: bilevel build"),
        (no_driver(), {}, "the CUDA driver libcuda.so.1 cannot be opened; install it"),
        (ORIN, {"architectures": [110]}, "it was built for sm_110, this machine has sm_87 (Orin); build one on this machine"),
        (
            ORIN,
            {"backend": "tensorrt-rtx", "architectures": [86]},
            "TensorRT-RTX does not serve this GPU, TensorRT does: bilevel build",
        ),
        (
            replace(ORIN, gpus=(Gpu("RTX", 89, 8 << 30, False),)),
            {"backend": "tensorrt-rtx", "architectures": [86]},
            "--backend tensorrt-rtx --sm 89",
        ),
        (ORIN, {"version": "10.3.0"}, "it was built by tensorrt 10.3.0, installed is 11.4.0"),
        (
            replace(ORIN, packages={**ORIN.packages, "tensorrt": "(installed, but does not load: no libnvinfer)"}),
            {},
            "the Python module tensorrt is (installed, but does not load: no libnvinfer); install version 11.4.0",
        ),
        (
            replace(ORIN, packages={**ORIN.packages, "tensorrt": None}),
            {},
            "the Python module tensorrt is not installed; install",
        ),
        (replace(ORIN, packages={**ORIN.packages, "cuda.bindings": None}), {}, "pip install 'cuda-bindings==12.*'"),
        (
            replace(ORIN, packages={**ORIN.packages, "cuda.bindings": "(installed, but does not load: no libcuda)"}),
            {},
            "cuda.bindings is (installed, but does not load: no libcuda); pip install 'cuda-bindings==12.*'",
        ),
        (ORIN, {"graph_sha256": "0" * 64}, "it was built from another graph than model.onnx; build it anew"),
        (
            ORIN,
            {"memory_bytes": {"weights": 9 << 30, "activations": 0, "caches": 0}},
            "it needs 9216 MiB, the GPU has 7936 MiB to give; build it with a smaller",
        ),
        (
            ORIN,
            {"plugins": {"nodes": 3, "library": None}},
            "it needs a kernel library, and there is none; build one: bilevel kernels",
        ),
    ],
)
def test_why_an_engine_does_not_run(machine: Machine, changes: dict[str, Any], expected: str, bundle: Path) -> None:
    found = problem(bundle, machine, **changes)
    assert expected in found if expected else found == ""


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, ""),
        (
            {"target": "x86_64"},
            "is for x86_64, this machine is aarch64; build one: bilevel kernels build --geometry BUNDLE --arch sm_87",
        ),
        ({"tensorrt": None}, "was built without TensorRT's headers and has no plugins"),
        ({"architectures": {"80": "12.6"}}, "holds no kernels for this GPU; build one: .* --arch sm_87"),
        ({"library": "something else"}, "is no kernel library"),
    ],
)
def test_libraries_that_do_not_serve(changes: dict[str, Any], expected: str, bundle: Path, tmp_path: Path) -> None:
    library = write_library(tmp_path / "library.so", **changes)
    found = problem(bundle, library=library, plugins={"nodes": 3, "library": None})
    assert re.search(expected, found) if expected else found == ""


def test_another_library_than_the_engines(bundle: Path, tmp_path: Path) -> None:
    library = write_library(tmp_path / "library.so")
    found = problem(bundle, library=library, plugins={"nodes": 3, "library": "0" * 64})
    assert "is another kernel library than the one it was built with; give that one, or build it anew" in found


def test_the_order_of_the_library(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Argument, bundle, environment, package."""
    monkeypatch.setenv(LIBRARY_VARIABLE, str(write_library(tmp_path / "environment.so")))
    assert find_library(bundle, ORIN) == tmp_path / "environment.so"
    within = write_library(bundle / "kernels" / "aarch64" / "libbilevel_kernels.so", of=str(tmp_path))
    assert find_library(bundle, ORIN) == tmp_path / "environment.so"
    trust(within)
    assert find_library(bundle, ORIN) == within
    named = write_library(tmp_path / "named.so")
    assert find_library(bundle, ORIN, named) == named
    places = [where for where, _ in library_places(bundle, ORIN, named)]
    assert places == ["argument", "bundle", "environment", "package"]
    with pytest.raises(KernelError, match="absent.so is no file; build it: bilevel kernels build --geometry .* --out"):
        find_library(bundle, ORIN, tmp_path / "absent.so")


def test_opening_takes_onnx_runtime_where_nothing_else_runs(bundle: Path) -> None:
    write_engine(bundle, "engine", architectures=[1])
    session, why = open_session(bundle, "auto")
    assert session.bundle.folder == bundle and "model.onnx in ONNX Runtime on the CPU (not engine: " in why
    assert open_session(bundle, "onnx")[1] == "ONNX Runtime on the CPU"
    with pytest.raises(EngineError, match="nothing runs this bundle here: engine: "):
        open_session(bundle, "tensorrt")


def test_a_machine_with_a_gpu(tmp_path: Path) -> None:
    with fake_gpu(tmp_path) as gpu:
        gpu.configure(version=12060, capability=87)
        found = look()
        assert found.gpus == (Gpu("Fake Orin", 87, 8 << 30, True),) and found.driver_cuda == "12.6" and not found.driver_problem
        gpu.configure(context=False)
        assert look().driver_problem == "the CUDA driver sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES"
        gpu.configure(load_result=100)
        assert "the CUDA driver does not start (CUDA error 100)" in look().driver_problem


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_package("numpy") is not None and find_package("onnxruntime") is not None

    def broken(name: str) -> Any:
        raise OSError("libnvinfer.so.11: cannot open shared object file\nmore")

    def lacking(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'tensorrt_libs'", name="tensorrt_libs")

    def absent(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'cuda'", name="cuda")

    for raised, module, expected in (
        (broken, "tensorrt", "(installed, but does not load: libnvinfer.so.11: cannot open shared object file)"),
        (lacking, "tensorrt", "(installed, but does not load: No module named 'tensorrt_libs')"),
        (absent, "cuda.bindings", None),
    ):
        monkeypatch.setattr(machine_module.importlib, "import_module", raised)
        assert find_package(module) == expected


def test_the_version_is_the_modules_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine is held against ``__version__``; a distribution of the same name may be another's."""
    monkeypatch.setattr(machine_module.importlib, "import_module", lambda name: SimpleNamespace(__version__="10.3.0"))
    monkeypatch.setattr(machine_module.importlib.metadata, "version", lambda name: "10.3.0.30+cuda12.5")
    assert find_package("tensorrt") == "10.3.0"
    monkeypatch.setattr(machine_module.importlib, "import_module", lambda name: SimpleNamespace())
    assert find_package("tensorrt") == "10.3.0.30+cuda12.5"


JETPACK_7 = replace(ORIN, driver_cuda="13.0", jetpack="JetPack 7.1", gpus=(Gpu("Thor", 110, 128 << 30, True),))


@pytest.mark.parametrize(
    "machine, bindings, wheels, expected",
    [
        (ORIN, "12.9.0", [], []),
        (ORIN, "13.5.0", [], ["cuda-bindings 13.5.0 is for CUDA 13, JetPack 6.2's driver for CUDA 12.6: JetPack 6.2 .*==12"]),
        (ORIN, "12.9.0", ["tensorrt-cu13"], ["tensorrt-cu13 is for CUDA 13, .* 12.6: JetPack 6.2 .* TensorRT 10.3"]),
        (ORIN, "13.5.0", ["tensorrt-cu13", "tensorrt-cu12"], ["cuda-bindings 13.5.0", "tensorrt-cu13"]),
        (replace(ORIN, jetpack=None), "13.5.0", [], ["cuda-bindings 13.5.0 is for CUDA 13, the driver for CUDA 12.6"]),
        (replace(ORIN, driver_cuda="11.4"), "12.9.0", [], ["cuda-bindings 12.9.0 .* install a driver for CUDA 12 or newer"]),
        (JETPACK_7, "13.5.0", ["tensorrt-cu13"], []),
        (replace(JETPACK_7, driver_cuda="13.0"), "14.0", [], ["cuda-bindings 14.0 .*JetPack 7.x .* 'cuda-bindings==13"]),
        (no_driver(), "13.5.0", ["tensorrt-cu13"], []),
        (ORIN, "(installed, but does not load: x)", [], []),
    ],
)
def test_versions_that_do_not_fit(machine: Machine, bindings: str, wheels: list[str], expected: list[str]) -> None:
    given = replace(machine, packages={**machine.packages, "cuda.bindings": bindings})
    found = list(pair_problems(given, wheels))
    assert len(found) == len(expected) and all(map(re.search, expected, found))


def test_the_gpu_is_really_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Memory that works, memory that is refused, memory that forgets; a library that does not load."""
    monkeypatch.setattr("bilevel.runtime.cli.doctor.look", lambda: ORIN)
    broken = write_library(tmp_path / "library.so")

    def refused() -> Any:
        raise EngineError("CUDA refused a stream (CUDA driver version is insufficient, error 35); bilevel doctor tells")

    class Forgets(FakeDevice):
        def upload(self, address: int, array: Any) -> None:
            """Nothing is copied."""

    for device, expected in (
        (FakeDevice, "works +memory of the GPU: 1 MiB written and read, 1.0 GiB free"),
        (refused, "fails +memory of the GPU: CUDA refused a stream .CUDA driver version is insufficient, error 35."),
        (Forgets, "fails +memory of the GPU: what was copied to the GPU came back changed"),
    ):
        monkeypatch.setattr(trials, "CudaDevice", device)
        assert main(["doctor", "--library", str(broken)]) == 0
        text = capsys.readouterr().out
        assert re.search("works +driver version: CUDA 12.6\n", text) and re.search(expected, text), text
        assert re.search(f"fails +load {broken}: .*", text)


def test_jetpack(tmp_path: Path) -> None:
    tegra, dpkg = tmp_path / "nv_tegra_release", tmp_path / "status"
    assert find_jetpack(tegra, dpkg) is None
    tegra.write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n")
    assert find_jetpack(tegra, dpkg) == "Jetson Linux 36.4.3"
    dpkg.write_text(
        "Package: libc6\nVersion: 2.35\n\nPackage: nvidia-jetpack\nStatus: install\nVersion: 6.2+b77\n\nPackage: x\n"
    )
    assert find_jetpack(tegra, dpkg) == "JetPack 6.2+b77"


def test_the_command(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_engine(bundle, "engine", architectures=[1])
    assert main(["doctor", str(bundle), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [option["runs"] for option in facts["backends"]] == [False, True, False] and facts["machine"]["system"] == "Linux"
    assert main(["doctor", str(bundle)]) == 0
    text = capsys.readouterr().out
    assert "does not  engine (tensorrt): " in text and "runs      model.onnx in ONNX Runtime on the CPU (onnx)" in text
    assert main(["doctor"]) == 0
    assert "BUNDLE" not in capsys.readouterr().out.split("kernel library")[0]


def test_the_library_that_is_taken(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The places in their order, the first that is there marked, each with its hash; and all that --json promises."""
    from hashlib import sha256

    from bilevel.runtime.cli.doctor import EPILOG

    monkeypatch.setattr("bilevel.runtime.cli.doctor.look", lambda: ORIN)
    monkeypatch.setenv(LIBRARY_VARIABLE, str(write_library(tmp_path / "environment.so", target="x86_64")))
    within = write_library(bundle / "kernels" / "aarch64" / "libbilevel_kernels.so", of=str(tmp_path))
    assert main(["doctor", str(bundle), "--library", str(tmp_path / "absent.so")]) == 2
    assert "absent.so is no file; build it: bilevel kernels build" in capsys.readouterr().err
    assert main(["doctor", str(bundle)]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"{within} is native code that came with the bundle, .*: bilevel kernels trust {within}", text)
    trust(within)
    assert main(["doctor", str(bundle)]) == 0
    text = capsys.readouterr().out
    digest = sha256(within.read_bytes()).hexdigest()
    assert re.search(
        rf"bundle +{within}: kernels for sm_87 \[SHA-256 {digest[:12]}, taken\]\n +environment +.* is for x86_64", text
    )
    assert main(["doctor", str(bundle), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [each["from"] for each in facts["libraries"]] == ["bundle", "environment", "package"]
    assert [each["is_taken"] for each in facts["libraries"]] == [True, False, False]
    for keys in (
        facts,
        facts["machine"],
        facts["machine"]["gpus"][0],
        facts["libraries"][0],
        facts["trials"][0],
        facts["backends"][0],
    ):
        assert [key for key in keys if key not in EPILOG] == []


def test_a_bundle_that_nothing_runs(bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bilevel.runtime.cli.doctor.look", lambda: replace(no_driver(), packages={}))
    assert main(["doctor", str(bundle)]) == 1
    assert "onnxruntime is not installed; pip install 'bilevel[cpu]'" in capsys.readouterr().out


def test_with_nothing_installed_but_numpy(bundle: Path, tmp_path: Path) -> None:
    """A folder of site-packages that has only numpy in it."""
    import numpy

    only = tmp_path / "only"
    only.mkdir()
    installed = Path(numpy.__file__).parents[1]
    for name in installed.glob("numpy*"):
        (only / name.name).symlink_to(name)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{only}"}
    command = [sys.executable, "-S", "-m", "bilevel.runtime.cli.main", "doctor", str(bundle)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert run.returncode == 1, run.stderr
    assert "onnxruntime is not installed; pip install 'bilevel[cpu]'" in run.stdout
