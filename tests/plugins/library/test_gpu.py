"""Kernel libraries: planned, built, opened, and their C launcher run on host memory against the reference."""

from __future__ import annotations

import ctypes
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bilevel import contract
from bilevel.errors import KernelError, MissingDependency
from bilevel.plugins.launch.plans import RUNTIME_SIZES
from bilevel.plugins.launch.tiles import ARCHITECTURES
from bilevel.plugins.library.build import build_library, find_compiler, launches_of, plan_variants
from bilevel.plugins.library.gpu import DeviceTensor, KernelCall, KernelLibrary, serves
from bilevel.plugins.tensorrt.fields import workspace_limit
from tests.doubles.gpu import Gpu, build, call_of, fake_gpu, number_kernels, request_of
from tests.support.operator_calls import assert_same, make_call, run_reference

NAMES = [op.name for op in contract.GPU_OPS]
LENGTHS = (1, 6, 20)  # every plan of every operator: few tokens, several, many


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module")
def library(folder: Path) -> KernelLibrary:
    """All operators in the geometry of ``make_call``, fp32; attention and experts in 16 bits as well."""
    requests = [request_of(name, *make_call(name)) for name in NAMES]
    requests += [(op, geometry, dtype) for op, geometry, _ in requests for dtype in ("float16", "bfloat16")]
    with fake_gpu(folder):
        return build(requests, folder / "library.so", (80, 87, 90))


@pytest.fixture
def gpu(folder: Path, library: KernelLibrary) -> Iterator[Gpu]:
    with fake_gpu(folder) as gpu:
        yield gpu


def anew(library: KernelLibrary, path: Path) -> KernelLibrary:
    """The same library as another file: loaded apart from the first, with nothing opened yet."""
    return KernelLibrary(Path(shutil.copy(library.path, path)))


def run(library: KernelLibrary, gpu: Gpu, name: str, call: KernelCall, slack: int = 0) -> list[torch.Tensor]:
    """The outputs of a call whose workspace is as large as the library asks for, and not a byte larger."""
    size = library.workspace_size(call, 80) + slack
    workspace = gpu.memory.bytes(size)
    library.launch(call, workspace.data_ptr(), size)
    return [gpu.memory.read(tensor) for tensor in call.outputs]


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_the_c_launcher_equals_the_reference(name: str, tokens: int, library: KernelLibrary, gpu: Gpu) -> None:
    inputs, attributes = make_call(name, tokens)
    assert_same(run(library, gpu, name, call_of(gpu.memory, name, inputs, attributes)), run_reference(name, inputs, attributes))
    assert gpu.driver.fake_launches() > 0


def test_a_cache_is_copied_only_where_it_lies_elsewhere(library: KernelLibrary, gpu: Gpu) -> None:
    inputs, attributes = make_call("WriteCache", 3)
    call = call_of(gpu.memory, "WriteCache", inputs, attributes)
    expected = run_reference("WriteCache", inputs, attributes)
    assert_same(run(library, gpu, "WriteCache", call), expected)
    assert gpu.driver.fake_copies() == 1
    in_place = KernelCall(call.op, call.inputs, [call.inputs[0]], attributes)
    assert_same(run(library, gpu, "WriteCache", in_place), expected)
    assert gpu.driver.fake_copies() == 1
    nothing = call_of(gpu.memory, "WriteCache", {**inputs, "update": torch.zeros(2, 3, 0, 5)}, attributes)
    assert_same(run(library, gpu, "WriteCache", nothing), [inputs["cache"]])
    assert gpu.driver.fake_copies() == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype: torch.dtype, library: KernelLibrary, gpu: Gpu) -> None:
    inputs, attributes = make_call("RoutedAttention", 2)
    narrow = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    (got,) = run(library, gpu, "RoutedAttention", call_of(gpu.memory, "RoutedAttention", narrow, attributes))
    wide = {key: x.float() if x.is_floating_point() else x for key, x in narrow.items()}
    (expected,) = run_reference("RoutedAttention", wide, attributes)
    torch.testing.assert_close(got.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("tokens", range(1, 20))
@pytest.mark.parametrize("name", NAMES)
def test_the_workspace_of_the_largest_call_serves_every_smaller_one(
    name: str, tokens: int, library: KernelLibrary, gpu: Gpu
) -> None:
    most = library.workspace_size(call_of(gpu.memory, name, *make_call(name, 20)), 80)
    needed = library.workspace_size(call_of(gpu.memory, name, *make_call(name, tokens)), 80)
    variant = plan_variants([request_of(name, *make_call(name))], [80])[0]
    inputs, attributes = make_call(name, tokens)
    sizes = contract.BY_NAME[name].bind_shapes([x.shape for x in inputs.values()])
    used = [plan.workspace_bytes(sizes) for plan in variant.plans[80]]
    assert needed <= most and needed >= used[-1]
    assert library.workspace_size(call_of(gpu.memory, name, inputs, attributes)) >= needed  # of any architecture


@pytest.mark.parametrize("name", NAMES)
def test_a_workspace_for_any_architecture_does_not_depend_on_the_library(
    name: str, library: KernelLibrary, gpu: Gpu, folder: Path
) -> None:
    """An engine's workspace is fixed when it is built; it may run with a library for other GPUs."""
    call = call_of(gpu.memory, name, *make_call(name, 20))
    sizes = call.op.bind_shapes([tensor.shape for tensor in call.inputs])
    (variant,) = plan_variants([request_of(name, *make_call(name))], [80])
    expected = [workspace_limit(made, sizes) for made in variant.plans.values()]
    assert len(expected) == len(ARCHITECTURES) and library.workspace_size(call) == max(expected)
    with pytest.raises(KernelError, match="holds kernels for sm_80, sm_87, sm_90, none runs on sm_120"):
        library.workspace_size(call, 120)


def test_what_every_argument_points_to_is_counted() -> None:
    """The launcher's array of parameters holds them all."""
    for name in NAMES:
        for launch in launches_of(plan_variants([request_of(name, *make_call(name))], [80])).values():
            assert len(launch.arguments) + 2 <= 32


def test_expressions_in_cpp_are_those_of_python(library: KernelLibrary, gpu: Gpu) -> None:
    """The workspace of one plan at sizes beyond 32 bits: computed by both."""
    inputs, attributes = make_call("RoutedAttention", 20)
    call = call_of(gpu.memory, "RoutedAttention", inputs, attributes)
    big = {"B": 70000, "L": 70000, "M": 2**20}

    def grown(tensors: Any, ports: Any) -> list[DeviceTensor]:
        return [
            replace(tensor, shape=tuple(big.get(str(dim), size) for dim, size in zip(port.shape, tensor.shape, strict=True)))
            for tensor, port in zip(tensors, ports, strict=True)
        ]

    large = KernelCall(call.op, grown(call.inputs, call.op.inputs), grown(call.outputs, call.op.outputs), attributes)
    (variant,) = plan_variants([request_of("RoutedAttention", inputs, attributes)], [80])
    split, tiles = variant.plans[80]
    sizes = contract.ROUTED_ATTENTION.bind_shapes([tensor.shape for tensor in large.inputs])
    expected = max(tiles.workspace_bytes(sizes), split.workspace_bytes({**sizes, "L": 16}))
    assert expected > 2**32 and library.workspace_size(large, 80) == expected


def test_prepare_loads_everything_once(folder: Path, library: KernelLibrary, gpu: Gpu) -> None:
    call = call_of(gpu.memory, "RoutedExperts", *make_call("RoutedExperts", 1))
    fresh = anew(library, folder / "prepare.so")
    fresh.prepare(call)
    loads = gpu.driver.fake_loads()
    assert loads == len(launches_of(plan_variants([request_of("RoutedExperts", *make_call("RoutedExperts"))], [80])))
    fresh.prepare(call)
    run(fresh, gpu, "RoutedExperts", call)
    assert gpu.driver.fake_loads() == loads and gpu.driver.fake_launches() == 2


def test_an_empty_call_launches_nothing(library: KernelLibrary, gpu: Gpu) -> None:
    call = call_of(gpu.memory, "CoarseRoute", *make_call("CoarseRoute", 6))

    def emptied(tensors: Any) -> list[DeviceTensor]:
        return [replace(t, address=0, shape=tuple(0 if n == 2 else s for n, s in enumerate(t.shape))) for t in tensors]

    inputs = [*emptied(call.inputs[:1]), *call.inputs[1:]]
    library.launch(replace(call, inputs=inputs, outputs=emptied(call.outputs)))
    assert gpu.driver.fake_launches() == 0


def refused(gpu: Gpu, library: KernelLibrary, call: KernelCall, message: str, workspace_bytes: int | None = None) -> None:
    """Both that the library refuses, with one sentence, and that nothing was launched."""
    before = gpu.driver.fake_launches()
    workspace = gpu.memory.bytes(1 << 20)
    with pytest.raises(KernelError, match=message) as caught:
        library.launch(call, workspace.data_ptr(), 1 << 20 if workspace_bytes is None else workspace_bytes)
    assert "\n" not in str(caught.value) and gpu.driver.fake_launches() == before


def changed(call: KernelCall, index: int, **values: Any) -> KernelCall:
    inputs = list(call.inputs)
    inputs[index] = replace(inputs[index], **values)
    return replace(call, inputs=inputs)


def test_bad_calls_are_refused(library: KernelLibrary, gpu: Gpu) -> None:
    call = call_of(gpu.memory, "RoutedAttention", *make_call("RoutedAttention", 6))
    attributes = dict(call.attributes)
    for bad, message in (
        (changed(call, 0, shape=(2, 4, 6)), "q must have 4 dimensions, not 3"),
        (changed(call, 0, shape=(2, 4, 6, 7)), "k has D=6, elsewhere it is 7"),
        (changed(call, 1, shape=(3, 2, 20, 6)), "k has B=3, elsewhere it is 2"),
        (changed(call, 0, shape=(2, 4, -6, 6)), "q has L=-6, sizes are from 0"),
        (changed(call, 0, shape=(2, 4, 2**31, 6)), "q has L=2147483648, sizes are from 0"),
        (changed(call, 0, dtype="int32"), "q is int32, it must be float16, bfloat16 or float32"),
        (changed(call, 2, dtype="float16"), "v is float16, an earlier tensor is float32"),
        (changed(call, 3, dtype="float32"), "routes is float32, it must be int32"),
        (changed(call, 1, address=0), "the address of k is NULL"),
        (changed(call, 1, address=call.inputs[1].address + 4), "the address of k must be a multiple of 16"),
        (replace(call, inputs=call.inputs[:5]), "takes 6 inputs, not 5"),
        (replace(call, outputs=[]), "takes 1 outputs, not 0"),
        (replace(call, outputs=[replace(call.outputs[0], shape=(2, 4, 6, 7))]), "out has Dv=7, elsewhere it is 5"),
        (replace(call, attributes={}), "takes 3 attributes, not 0"),
        (replace(call, attributes={**attributes, "scale": float("nan")}), "the attribute scale must be finite"),
        (replace(call, attributes={**attributes, "causal": 2}), "causal=2.0* must be a whole number from 0 to 1"),
        (replace(call, attributes={**attributes, "block_size": 4.5}), "block_size=4.5"),
        (replace(call, attributes={**attributes, "block_size": float("nan")}), "block_size=-?nan"),
        (replace(call, attributes={"block_size": 4, "causal": 1, "size": 1}), "needs the attribute scale"),
    ):
        refused(gpu, library, bad, f"RoutedAttention.*{message}.*BAD_ARGUMENT")
    refused(
        gpu, library, replace(call, attributes={**attributes, "block_size": 8}), "no kernels for RoutedAttention.*NOT_BUILT"
    )
    experts = call_of(gpu.memory, "ExpertRoute", *make_call("ExpertRoute", 6))
    values = dict(experts.attributes)
    refused(
        gpu, library, replace(experts, attributes={**values, "score_func": "relu"}), '"relu" must be one of sigmoid, softmax'
    )
    refused(gpu, library, replace(experts, attributes={**values, "score_func": 1}), "score_func takes a text, not NULL")
    unknown = replace(call, op=replace(call.op, name="RoutedAttention2"))
    refused(gpu, library, unknown, 'there is no operator "RoutedAttention2"; the operators are CoarseRoute, FineRoute')


def test_a_workspace_that_does_not_suffice(library: KernelLibrary, gpu: Gpu) -> None:
    call = call_of(gpu.memory, "RoutedAttention", *make_call("RoutedAttention", 20))
    refused(gpu, library, call, "needs a workspace of [0-9]+ bytes here, not 255; ask bilevel_workspace_size", 255)
    workspace = gpu.memory.bytes(1 << 20)
    with pytest.raises(KernelError, match="the workspace must be a multiple of 256"):
        library.launch(call, workspace.data_ptr() + 16, 1 << 19)
    with pytest.raises(KernelError, match="bytes here, not 0"):
        library.launch(call)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"capability": 75}, "holds kernels for sm_80, sm_87, sm_90, none runs on sm_75; build one: .* --arch sm_75"),
        ({"capability": 100}, "none runs on sm_100"),
        ({"capability": 103}, "none runs on sm_103"),
        ({"context": False}, "no current CUDA context; make one current first: some error \\(CUDA error 201\\)"),
    ],
)
def test_gpus_that_do_not_serve(settings: dict[str, Any], message: str, library: KernelLibrary, gpu: Gpu) -> None:
    gpu.configure(**settings)
    refused(gpu, library, call_of(gpu.memory, "CoarseRoute", *make_call("CoarseRoute", 6)), message)


@pytest.mark.parametrize("capability", [80, 86, 89, 87, 90])
def test_gpus_that_serve(capability: int, library: KernelLibrary, gpu: Gpu) -> None:
    """Code for sm_80 serves 86 and 89; Orin has its own."""
    gpu.configure(capability=capability)
    inputs, attributes = make_call("FineRoute", 6)
    call = call_of(gpu.memory, "FineRoute", inputs, attributes)
    assert_same(run(library, gpu, "FineRoute", call), run_reference("FineRoute", inputs, attributes))


def test_drivers_that_do_not_serve(folder: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(gpu.memory, "ExpertRoute", *make_call("ExpertRoute", 6))
    made = build([request_of("ExpertRoute", *make_call("ExpertRoute"))], folder / "cuda13.so", cuda="13")
    gpu.configure(version=11080)
    refused(gpu, made, call, "the CUDA driver is for CUDA 11.8, the kernels need 12.0; install a newer driver.*NO_DRIVER")
    gpu.configure(version=12060)
    refused(gpu, made, call, "was made for CUDA 13, the driver is for CUDA 12.*NO_DRIVER")
    gpu.configure(load_result=2)
    refused(gpu, anew(made, folder / "full.so"), call, "cannot be loaded: out of memory \\(CUDA error 2\\).*CUDA_ERROR")
    monkeypatch.setenv("BILEVEL_CUDA_DRIVER", str(folder / "absent.so"))
    refused(gpu, anew(made, folder / "none.so"), call, "absent.so cannot be opened; install NVIDIA's driver.*NO_DRIVER")


def mutated(call: KernelCall, random: np.random.Generator) -> KernelCall:
    """A call with one or two of its shapes, types, addresses, tensors or attributes changed."""
    tensors, attributes = [list(call.inputs), list(call.outputs)], dict(call.attributes)
    for _ in range(random.integers(1, 3)):
        side, change = tensors[random.integers(2)], random.integers(6)
        if change == 5 or not side:
            if attributes:
                attributes[str(random.choice(list(attributes)))] = random.choice([0, 1, 2, 2.5, -1, 1e30, np.nan])
            continue
        at = int(random.integers(len(side)))
        shape = list(side[at].shape)
        if change == 0 and shape:
            shape[random.integers(len(shape))] = int(random.choice([-1, 0, 1, 2, 3, 6, 2**31 - 1, 2**31, 2**62]))
            side[at] = replace(side[at], shape=tuple(shape))
        elif change == 1:
            side[at] = replace(side[at], dtype=str(random.choice(["float16", "int32", "float32", "complex64"])))
        elif change == 2:
            side[at] = replace(side[at], address=int(random.choice([0, 1, 8, side[at].address])))
        elif change == 3:
            side[at] = replace(side[at], shape=side[at].shape[: random.integers(4)])
        else:
            side.pop(at)
    return KernelCall(call.op, *tensors, attributes)


def test_random_calls_never_launch_what_breaks_the_contract(library: KernelLibrary, gpu: Gpu) -> None:
    """Refused in a sentence, or still a call of the geometry that the library was built for."""
    random = np.random.default_rng(7)
    calls = [call_of(gpu.memory, name, *make_call(name, 6)) for name in NAMES]
    workspace = gpu.memory.bytes(1 << 22)
    refusals = 0
    gpu.driver.fake_configure(13000, 80, 1, 0, None)  # launches are counted, not run
    for _ in range(3000):
        call = calls[random.integers(len(calls))]
        changed_call = mutated(call, random)
        before = gpu.driver.fake_launches()
        try:
            library.launch(changed_call, workspace.data_ptr(), 1 << 22)
        except KernelError as error:
            refusals += 1
            assert str(error) and gpu.driver.fake_launches() == before
            continue
        sizes, expected = (call.op.bind_shapes([tensor.shape for tensor in one.inputs]) for one in (changed_call, call))
        assert all(size == expected[name] for name, size in sizes.items() if name not in RUNTIME_SIZES)
    assert 2000 < refusals < 2990


def test_raw_pointers_that_are_null(library: KernelLibrary) -> None:
    raw = ctypes.CDLL(str(library.path))
    raw.bilevel_last_error.restype = ctypes.c_char_p
    raw.bilevel_status_text.restype = ctypes.c_char_p
    size = ctypes.c_size_t()
    assert raw.bilevel_launch(None, None, ctypes.c_size_t(0), None) == 1 and raw.bilevel_last_error() == b"the call is NULL"
    assert raw.bilevel_workspace_size(None, 0, ctypes.byref(size)) == 1
    assert raw.bilevel_workspace_size(None, 0, None) == 1 and b"number of bytes is NULL" in raw.bilevel_last_error()
    zeros = (ctypes.c_char * 256)()
    assert raw.bilevel_prepare(zeros) == 1 and b"size=0" in raw.bilevel_last_error()
    zeros[0] = 64  # the size of bilevel_call
    assert raw.bilevel_prepare(zeros) == 1 and raw.bilevel_last_error() == b"the operator's name is NULL"
    assert len({raw.bilevel_status_text(status) for status in range(-1, 9)}) == 9


def test_info_names_what_the_library_holds(library: KernelLibrary) -> None:
    assert library.info["abi"] == 1 and set(library.info["architectures"]) == {"80", "87", "90"}
    assert len(library.info["variants"]) == 17  # three types, and SelectBlocks and ExpertRoute have no model type
    assert {"op": "ExpertRoute", "dtype": "float32"}.items() <= library.info["variants"][4].items()


def test_files_that_are_no_library(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="absent.so is no kernel library for this machine"):
        KernelLibrary(tmp_path / "absent.so")
    (tmp_path / "text.so").write_text("no")
    with pytest.raises(KernelError, match="text.so is no kernel library for this machine .*build one: bilevel kernels build"):
        KernelLibrary(tmp_path / "text.so")


def test_a_failing_build_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "library.so"
    out.write_text("before")
    request = request_of("ExpertRoute", *make_call("ExpertRoute"))
    (tmp_path / "broken").write_text("#!/bin/sh\necho 'x.cpp:1: error: no C++17' >&2\nexit 1\n")
    (tmp_path / "broken").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "broken"))
    with pytest.raises(KernelError, match="broken could not build the library .x.cpp:1: error: no C.*17.; install a compiler"):
        build_library([request], [80], out, compile_all=number_kernels)

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_library([request], [80], out, compile_all=interrupted)
    assert out.read_text() == "before" and sorted(path.name for path in tmp_path.iterdir()) == ["broken", "library.so"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MissingDependency, match="the C.. compiler no-such-compiler is not installed; .* apt install g"):
        build_library([request], [80], out, compile_all=number_kernels)
    with pytest.raises(KernelError, match="there is no target 'riscv64'; take x86_64 or aarch64"):
        find_compiler("riscv64")


def test_after_prepare_a_launch_may_be_captured(folder: Path, library: KernelLibrary, gpu: Gpu) -> None:
    """Code is loaded lazily, with the first launch, unless it is asked for: a first load in a capture is refused."""
    inputs, attributes = make_call("RoutedAttention", 6)
    call = call_of(gpu.memory, "RoutedAttention", inputs, attributes)
    fresh = anew(library, folder / "captured.so")
    gpu.driver.fake_capture(1)
    refused(gpu, fresh, call, "cannot be loaded: some error .CUDA error 900.", 1 << 20)
    gpu.driver.fake_capture(0)
    fresh.prepare(call)
    gpu.driver.fake_capture(1)
    assert_same(run(fresh, gpu, "RoutedAttention", call), run_reference("RoutedAttention", inputs, attributes))
    gpu.driver.fake_capture(0)


def test_code_that_takes_more_shared_memory_than_the_gpu_has(folder: Path, library: KernelLibrary, gpu: Gpu) -> None:
    """sm_80 has more of it than 86 and 89, which run its code: said by the library's description, and before a launch."""
    gpu.configure(capability=89)
    large = dict.fromkeys(library.info["architectures"], 117 * 1024)
    assert serves({**library.info, "shared": large}, 80) and not serves({**library.info, "shared": large}, 89)
    assert serves(library.info, 89) and not serves(library.info, 88) and not serves(library.info, 75)
    assert max(library.info["shared"].values()) > 48 * 1024, "an estimate of a kernel that has to ask for it"
    gpu.driver.fake_most_shared(48 * 1024)
    fresh, said = anew(library, folder / "shared.so"), []
    for name in (op.name for op in contract.GPU_OPS):
        try:
            fresh.prepare(call_of(gpu.memory, name, *make_call(name, 6)))
        except KernelError as error:
            said.append(str(error))
    message = "takes [0-9]+ bytes of shared memory, sm_89 has 49152; build it for that GPU: .* --arch sm_89"
    assert said and all(re.search(message, each) for each in said)


def test_copies_of_caches_are_counted(folder: Path, library: KernelLibrary, gpu: Gpu) -> None:
    inputs, attributes = make_call("WriteCache", 3)
    call = call_of(gpu.memory, "WriteCache", inputs, attributes)
    fresh = anew(library, folder / "copies.so")
    assert fresh.num_copies() == 0
    run(fresh, gpu, "WriteCache", call)
    assert fresh.num_copies() == 1
    run(fresh, gpu, "WriteCache", replace(call, outputs=[call.inputs[0]]))
    assert fresh.num_copies() == 1
