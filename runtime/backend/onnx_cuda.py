"""The graph in ONNX Runtime on a GPU: its portable bodies on the CUDA provider, its rows in ``device_caches``.

The routed operators' library is for CPUs, so it is not registered; ONNX Runtime runs what the provider has no kernel for on the
CPU, with copies to the host and back. By default it also runs the whole graph there, silently, where the provider fails; here
that is an error.
"""

from __future__ import annotations

from typing import Any

from bilevel.bundle.format import Bundle
from bilevel.bundle.tensors import DTYPES, TensorSpec
from bilevel.errors import EngineError
from bilevel.machine import find_provider_problem, preload_cuda
from bilevel.runtime.backend.device_caches import DeviceCaches
from bilevel.runtime.backend.device_layout import RowMemory
from bilevel.runtime.backend.device_memory import CudaDevice
from bilevel.runtime.backend.onnx_graph import OnnxGraph, translated
from bilevel.runtime.backend.session import SessionLimits

PROVIDER = "CUDAExecutionProvider"


class CudaSession(OnnxGraph):
    """A bundle opened in ONNX Runtime on the current GPU. Raises EngineError where its CUDA provider does not load.

    threads: of the nodes that stay on the CPU.
    """

    backend = "onnx-cuda"

    def __init__(self, bundle: Bundle, threads: int = 0, gpu: CudaDevice | None = None) -> None:
        self.gpu = CudaDevice() if gpu is None else gpu
        super().__init__(bundle, threads)
        present = {name for _, name in bundle.graph.state}
        self.results = tuple(spec for spec in bundle.graph.outputs if spec.name not in present)
        self.only_read: tuple[TensorSpec, ...] = ()
        self.longest = bundle.prefill_chunk

    @property
    def device(self) -> str:
        """See ``Session.device``."""
        return f"cuda:{self.gpu.dlpack_device[1]}"

    @property
    def limits(self) -> SessionLimits:
        """See ``Session.limits``: the model's and the GPU's memory's."""
        return SessionLimits(longest_call=self.longest, cache_bytes=self.gpu.free_bytes())

    def _open_graph(self, options: Any) -> Any:
        ort, bundle = self._ort, self.bundle
        preload_cuda(ort)
        # Our stream: copies and calls are in order without waiting. Products in fp32 as the CPU makes them, not in tf32.
        own = {"device_id": "0", "user_compute_stream": str(self.gpu.stream), "use_tf32": "0"}
        if PROVIDER not in ort.get_available_providers():
            raise EngineError(find_provider_problem())
        ort.set_default_logger_severity(4)  # why the provider does not load is said below
        with translated(f"{bundle.graph_path} cannot be opened by ONNX Runtime on the GPU", "bilevel run --backend onnx"):
            # Otherwise a provider that fails is replaced by the CPU, at opening and in any later call.
            session = ort.InferenceSession(
                bundle.graph_path, options, providers=[(PROVIDER, own), "CPUExecutionProvider"], enable_fallback=0
            )
        ort.set_default_logger_severity(3)
        if PROVIDER not in session.get_providers():
            raise EngineError(find_provider_problem() or f"ONNX Runtime left out {PROVIDER}; bilevel doctor tells what is here")
        return session

    def allocate(self, batch: int, capacity: int) -> CudaCaches:
        """See ``Session.allocate``.

        Raises RequestError where the sizes are wrong, EngineError where the memory is not there.
        """
        self._check_sizes(batch, capacity)
        return CudaCaches(self, self._session, batch, capacity, RowMemory.allocate(self, batch, capacity))


class CudaCaches(DeviceCaches):
    """See ``DeviceCaches``.

    A binding serves all calls of one length: one for single tokens, one for the last piece of a prompt.
    """

    def __init__(self, session: CudaSession, graph: Any, batch: int, capacity: int, memory: RowMemory) -> None:
        super().__init__(session, batch, capacity, memory)
        self._cuda_session, self._graph = session, graph
        self._bindings: dict[int, Any] = {}

    def rows(self, first: int, count: int) -> CudaCaches:
        """See ``Caches.rows``. Raises RequestError where a row of a cache does not begin where a GPU reads."""
        return CudaCaches(self._cuda_session, self._graph, count, self.capacity, self._memory_from(first))

    def _prepare(self, length: int) -> None:
        if length in self._bindings:
            return
        self._bindings = {1: self._bindings[1]} if 1 in self._bindings else {}
        binding, addresses = self._graph.io_binding(), self.addresses(length)
        sizes = {**self._bundle.sizes(self.batch, self.capacity), "new_tokens": length}
        for specs, bind in ((self._bundle.graph.inputs, binding.bind_input), (self._bundle.graph.outputs, binding.bind_output)):
            for spec in specs:
                kind = DTYPES[spec.dtype].onnx_type
                bind(spec.name, "cuda", 0, kind, spec.resolve(sizes), addresses[spec.name])
        self._bindings[length] = binding

    def _execute(self, length: int) -> None:
        with translated("ONNX Runtime could not run the graph on the GPU", "use fewer or shorter prompts, or a smaller chunk"):
            self._graph.run_with_iobinding(self._bindings[length])
