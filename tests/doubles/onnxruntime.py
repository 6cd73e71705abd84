"""A double of ONNX Runtime with its CUDA provider: graphs execute on the CPU, in memory that is called a GPU's.

It enforces what the real one does: memory of a device is given by its address, every input and output is bound before a run,
and what was enqueued is done when the run ends. Where the provider does not load, sessions are opened without it and say
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import onnxruntime as real

from bilevel.bundle.tensors import DTYPES
from tests.doubles.tensorrt import FakeDevice

PROVIDER = "CUDAExecutionProvider"
_KINDS = {each.onnx_type: each for each in DTYPES.values()}


class _Binding:
    def __init__(self, session: _Session) -> None:
        self.session, self.device = session, session.device
        self.real = session.real.io_binding()
        self.bound: dict[str, int] = {}

    def _check(self, name: str, kind: str, number: int, element: int, shape: Sequence[int], address: int) -> Any:
        assert (kind, number) == ("cuda", 0), "the rows are on the GPU"
        dtype = _KINDS[element].numpy
        self.device.array(address, (math.prod(shape),), dtype)  # it must lie inside what was allocated
        self.bound[name] = address
        return dtype

    def bind_input(self, name: str, kind: str, number: int, element: int, shape: Sequence[int], address: int) -> None:
        self.real.bind_input(name, "cpu", 0, self._check(name, kind, number, element, shape, address), shape, address)

    def bind_output(self, name: str, kind: str, number: int, element: int, shape: Sequence[int], address: int) -> None:
        self.real.bind_output(name, "cpu", 0, self._check(name, kind, number, element, shape, address), shape, address)


class _Session:
    def __init__(
        self, module: FakeOnnxruntime, path: Any, options: Any, providers: list[Any], enable_fallback: int = 1
    ) -> None:
        self.device, self.module = module.device, module
        (name, own), then = providers
        assert (name, then, enable_fallback) == (PROVIDER, "CPUExecutionProvider", 0), "a failing provider must not be replaced"
        assert own["user_compute_stream"] == str(self.device.stream), "copies would not be in order with calls"
        self.real = real.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.providers = [PROVIDER, "CPUExecutionProvider"] if module.loads else ["CPUExecutionProvider"]
        self.num_bindings = 0

    def get_providers(self) -> list[str]:
        return self.providers

    def get_inputs(self) -> Any:
        return self.real.get_inputs()

    def get_outputs(self) -> Any:
        return self.real.get_outputs()

    def io_binding(self) -> _Binding:
        self.num_bindings += 1
        return _Binding(self)

    def run_with_iobinding(self, binding: _Binding) -> None:
        if self.module.out_of_memory:
            raise RuntimeError(
                "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 9"
            )
        names = {port.name for port in (*self.get_inputs(), *self.get_outputs())}
        assert set(binding.bound) == {name for name in names if not name.startswith("hidden.")}, "every listed tensor is bound"
        for name in binding.bound:
            if name.startswith("past."):
                assert binding.bound[name] == binding.bound[name.replace("past.", "present.")], "a cache has one address"
        self.device.enqueue(lambda: self.real.run_with_iobinding(binding.real))
        self.device.synchronize()


class FakeOnnxruntime:
    """What the runtime uses of the module. has_provider: it was built with it. loads: the provider finds its libraries."""

    __version__, __file__ = real.__version__, "/nowhere/onnxruntime/__init__.py"

    def __init__(self, device: FakeDevice, *, has_provider: bool = True, loads: bool = True) -> None:
        self.device, self.has_provider, self.loads, self.out_of_memory = device, has_provider, loads, False
        self.sessions: list[_Session] = []
        self.severity = 2
        self.OrtValue = SimpleNamespace(ortvalue_from_shape_and_type=self._ask)

    def _ask(self, shape: Sequence[int], element: int, kind: str, number: int) -> object:
        assert (element, kind, number) == (1, "cuda", 0) and self.severity == 4, "the log would be printed"
        if not self.loads:
            raise RuntimeError("/src/provider_bridge_ort.cc:2465 GetProviderInfo_CUDA() CUDA Provider not available\n")
        return object()

    def set_default_logger_severity(self, severity: int) -> None:
        self.severity = severity

    def SessionOptions(self) -> Any:
        return real.SessionOptions()

    def get_available_providers(self) -> list[str]:
        return [*([PROVIDER] if self.has_provider else []), "CPUExecutionProvider"]

    def preload_dlls(self) -> None:
        print("Failed to load libcublasLt.so.13")

    def InferenceSession(self, *args: Any, **options: Any) -> _Session:
        self.sessions.append(_Session(self, *args, **options))
        return self.sessions[-1]
