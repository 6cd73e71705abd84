"""What can be wrong with an engine on a machine, through ``run`` and ``doctor``: one sentence with its remedy.

The machine is an Orin that is not there, its TensorRT and its GPU are doubles; everything else is what a user runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from bilevel.machine import Machine
from bilevel.plugins.library.gpu import trust
from bilevel.runtime.backend import engine as engine_session
from bilevel.runtime.cli.main import main
from tests.doubles.bundle import write_bundle
from tests.doubles.tensorrt import FakeDevice, FakeTensorrt, write_engine
from tests.runtime.cli.test_doctor import ORIN, no_driver, write_library

REBUILD = "build it anew: bilevel build .* --backend tensorrt"
RUNS = r"runs +fake \(tensorrt\)\n"
PLUGINS = {"nodes": 3, "library": "0" * 64}


@dataclass
class Scene:
    """A bundle with an engine, on a machine. library: given with --library."""

    bundle: Path
    machine: Machine
    device: FakeDevice
    trt: FakeTensorrt
    library: Path | None = None

    def engine(self, **changes: Any) -> Path:
        return write_engine(self.bundle, **changes)


def garbage(scene: Scene) -> None:
    """The manifest names its hash: only TensorRT can tell."""
    manifest = scene.engine()
    content = json.loads(manifest.read_text())
    manifest.with_suffix(".plan").write_bytes(b"garbage")
    content["plan"]["sha256"] = sha256(b"garbage").hexdigest()
    manifest.write_text(json.dumps(content))


def truncated(scene: Scene) -> None:
    plan = scene.engine().with_suffix(".plan")
    plan.write_bytes(plan.read_bytes()[:-9])


def absent_plan(scene: Scene) -> None:
    scene.engine().with_suffix(".plan").unlink()


def another_architecture(scene: Scene) -> None:
    scene.engine(architectures=[110])


def another_version(scene: Scene) -> None:
    scene.engine(version="10.3.0")


def another_platform(scene: Scene) -> None:
    scene.engine(platform="x86_64")


def no_library(scene: Scene) -> None:
    scene.engine(plugins=PLUGINS)


def absent_library(scene: Scene) -> None:
    scene.engine(plugins=PLUGINS)
    scene.library = scene.bundle / "absent.so"


def another_library(scene: Scene) -> None:
    scene.engine(plugins=PLUGINS)
    trust(write_library(scene.bundle / "kernels" / "aarch64" / "libbilevel_kernels.so"))


def library_that_came_with_the_bundle(scene: Scene) -> None:
    scene.engine(plugins=PLUGINS)
    write_library(scene.bundle / "kernels" / "aarch64" / "libbilevel_kernels.so", of=str(scene.bundle))


def library_of_another_machine(scene: Scene) -> None:
    scene.engine(plugins={"nodes": 3, "library": None})
    scene.library = write_library(scene.bundle.parent / "library.so", target="x86_64")


def refused_library(scene: Scene) -> None:
    scene.engine(plugins={"nodes": 3, "library": None})
    scene.library = write_library(scene.bundle.parent / "library.so")
    scene.trt.refuses_libraries = True


def more_than_the_gpu_has(scene: Scene) -> None:
    scene.engine(memory_bytes={"weights": 9 << 30, "activations": 0, "caches": 0})


def others_use_the_gpu(scene: Scene) -> None:
    scene.engine()
    scene.device.limit = 1000


def no_room_for_activations(scene: Scene) -> None:
    scene.engine()
    scene.trt.has_memory = False


def absent_driver(scene: Scene) -> None:
    scene.engine()
    scene.machine = no_driver()


def absent_tensorrt(scene: Scene) -> None:
    scene.engine()
    scene.machine = replace(ORIN, packages={**ORIN.packages, "tensorrt": None})


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    (tmp_path / "bundle").mkdir()
    device = FakeDevice()
    made = Scene(write_bundle(tmp_path / "bundle"), ORIN, device, FakeTensorrt(device))
    monkeypatch.setattr(engine_session, "load_module", lambda backend: made.trt)
    monkeypatch.setattr(engine_session, "CudaDevice", lambda: device)
    for module in ("backend.select", "cli.doctor"):
        monkeypatch.setattr(f"bilevel.runtime.{module}.look", lambda: made.machine)
    return made


def test_nothing_is_wrong(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    scene.engine()
    assert main(["run", str(scene.bundle), "ab", "--max-tokens", "2", "--backend", "tensorrt"]) == 0
    assert "[fake]" in capsys.readouterr().err
    assert main(["doctor", str(scene.bundle)]) == 0
    assert re.search(RUNS, capsys.readouterr().out)


@pytest.mark.parametrize(
    "fault, expected, does_doctor_know",
    [
        (garbage, f"fake.plan does not load .the plan's magic tag does not match.; {REBUILD}", False),
        (truncated, f"fake.plan is damaged: its SHA-256 differs from the one in its manifest; {REBUILD}", True),
        (absent_plan, f"fake.plan (is missing|cannot be read .*); {REBUILD}", True),
        (
            another_architecture,
            "built for sm_110, this machine has sm_87 .Orin.; build one on this machine: bilevel build",
            True,
        ),
        (another_version, f"built by tensorrt 10.3.0, installed is 11.4.0; {REBUILD}", True),
        (another_platform, f"built on x86_64, this machine is aarch64; {REBUILD}", True),
        (no_library, "it needs a kernel library, and there is none; build one: bilevel kernels build --geometry", True),
        (absent_library, "absent.so is no file; build it: bilevel kernels build --geometry", True),
        (another_library, f"another kernel library than the one it was built with; give that one, or {REBUILD}", True),
        (library_that_came_with_the_bundle, "native code that came with the bundle, and this user neither built", True),
        (library_of_another_machine, "is for x86_64, this machine is aarch64; build one: bilevel kernels build", True),
        (refused_library, "TensorRT cannot load the plugins of .*library.so .*; build it anew: bilevel kernels build", False),
        (
            more_than_the_gpu_has,
            "needs 9216 MiB, the GPU has 7936 MiB to give; build it with a smaller --capacity or --batch",
            True,
        ),
        (others_use_the_gpu, "CUDA refused memory .out of memory.; use a smaller capacity, batch or chunk", False),
        (no_room_for_activations, f"the engine gets no memory to run .*; use a smaller batch, or {REBUILD}", False),
        (absent_driver, "the CUDA driver libcuda.so.1 cannot be opened; install it", True),
        (absent_tensorrt, "the Python module tensorrt is not installed; install version 11.4.0", True),
    ],
)
def test_one_sentence(
    fault: Callable[[Scene], None], expected: str, does_doctor_know: bool, scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program ends with it; ``doctor`` says the same without running anything, where that can be known."""
    fault(scene)
    given = [] if scene.library is None else ["--library", str(scene.library)]
    assert main(["run", str(scene.bundle), "ab", "--max-tokens", "2", "--backend", "tensorrt", *given]) == 2
    out, err = capsys.readouterr()
    # The line before it says what was chosen, where something was.
    (sentence,) = [line for line in err.strip().splitlines() if line != "[fake]"]
    assert out == "" and re.search(expected, sentence) and "Traceback" not in err
    status = main(["doctor", str(scene.bundle), *given])
    text = capsys.readouterr()
    if does_doctor_know:
        assert re.search(expected, text.out + text.err)
    else:
        assert status == 0 and re.search(RUNS, text.out)


def test_auto_goes_on_with_the_cpu(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    """An engine that is known not to run costs nobody the answer, and is named."""
    absent_plan(scene)
    assert main(["run", str(scene.bundle), "ab", "--max-tokens", "2"]) == 0
    assert re.search(r"\[model.onnx in ONNX Runtime on the CPU .not fake: .*fake.plan is missing", capsys.readouterr().err)
