"""Launch descriptions: expressions, workspaces, and the plans of every operator, without Triton or PyTorch's help."""

from __future__ import annotations

from typing import Any

import pytest

from bilevel import contract
from bilevel.errors import ContractError
from bilevel.plugins.launch import launches, tiles
from bilevel.plugins.launch.launches import ALIGNMENT, Buffer, LaunchPlan, choose_plan, evaluate
from bilevel.plugins.launch.plans import RUNTIME_SIZES, plans, plans_everywhere
from bilevel.plugins.library.sweep import geometries

SIZES = {"B": 2, "L": 21, "U": 700, "M": 4096, "T": 100}
ROUTE: dict[str, Any] = {"Hr": 4, "Hk": 2, "Dr": 64, "num_selection_heads": 2, "topk": 8, "block_size": 16}
ROUTE |= {"init_blocks": 1, "local_blocks": 1, "causal": 1}
_HEADS = {"Hq": 8, "Hkv": 2, "Hs": 2, "D": 64, "Dv": 64}
ATTENTION: dict[str, Any] = {**_HEADS, "K": 8, "block_size": 16, "causal": 1, "scale": 0.1}
EXPERTS: dict[str, Any] = {"E": 16, "k": 2, "d": 96, "f": 80}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("L", 21),
        ("B * L + 3 - 1", 44),
        ("B * (L + 3)", 48),
        ("ceil_div(U, 256)", 3),
        ("floor_div(M, 48)", 85),
        ("min(T * 2, ceil_div(T * 2, 64) + 8)", 12),
        ("max(B, 1)", 2),
        ("L <= 21", True),
        ("T * 2 <= 32 * 6", False),
    ],
)
def test_evaluate(expression: str, value: int) -> None:
    assert evaluate(expression, SIZES) == value


@pytest.mark.parametrize(
    "expression", ["Q", "L / 2", "L // 2", "abs(L)", "min(L)", "L.real", "1 <= L <= 3", "'a'", "2.0", "True"]
)
def test_evaluate_knows_nothing_else(expression: str) -> None:
    with pytest.raises(ContractError, match=r"is no size, number or function of plugins/launch/launches\.py"):
        evaluate(expression, SIZES)


def test_an_expression_is_compiled_once_and_evaluated_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    expression = "ceil_div(L * 3, 7) + min(U, 9)"
    assert evaluate(expression, SIZES) == 18
    monkeypatch.setattr(launches.ast, "parse", None)
    assert evaluate(expression, {"L": 7, "U": 1}) == 4
    with pytest.raises(ContractError, match="'U' in 'ceil_div.*' is no size"):
        evaluate(expression, {"L": 7})


def test_buffers_are_aligned_and_apart() -> None:
    plan = LaunchPlan(
        "one", "", (Buffer("a", "float16", "L"), Buffer("b", "int64", "B * L"), Buffer("c", "int32", "0 * L")), ()
    )
    assert plan.offsets(SIZES) == {"a": (0, 42), "b": (256, 336), "c": (768, 0)}
    assert plan.workspace_bytes(SIZES) == 768
    assert LaunchPlan("none", "", (), ()).workspace_bytes(SIZES) == 0


@pytest.mark.parametrize("dtype", contract.FLOAT_TYPES)
@pytest.mark.parametrize("op", contract.GPU_OPS, ids=lambda op: op.name)
def test_plans_are_complete(op: contract.Op, dtype: str) -> None:
    """Every expression has a value, every pointer is a port or a buffer, every grid is launchable, a plan is always found."""
    ports = {port.name for port in (*op.inputs, *op.outputs)}
    for geometry in geometries(op.name):
        for arch in tiles.ARCHITECTURES:
            made = plans(op, geometry, dtype, arch)
            assert [bool(plan.when) for plan in made] == [True] * (len(made) - 1) + [False]
            for plan in made:
                arrays = {buffer.name: buffer.kind for buffer in plan.buffers}
                assert not ports & set(arrays) and set(arrays.values()) <= set(contract.DTYPE_BYTES)
                assert plan.workspace_bytes(SIZES) % ALIGNMENT == 0
                written = {argument.name for launch in plan.launches for argument in launch.arguments}
                assert written >= (ports | set(arrays)) - {"cache"}
                for launch in plan.launches:
                    assert all(1 <= evaluate(size, SIZES) < 65536 for size in launch.grid[1:])
                    assert evaluate(launch.grid[0], SIZES) >= 1
                    assert launch.tile.shared <= tiles.shared_limit(arch)
                    for argument in launch.arguments:
                        if argument.kind == "int32":
                            assert evaluate(argument.value, SIZES) > 0
                        elif argument.kind == "float32":
                            assert argument.value in geometry
                        else:
                            assert argument.value in ports or arrays[argument.value] == argument.kind[1:]


@pytest.mark.parametrize(
    ("op", "geometry", "size", "few", "many"),
    [
        (contract.COARSE_ROUTE, ROUTE, "L", {8: "split"}, {9: "tiles"}),
        (contract.ROUTED_ATTENTION, ATTENTION, "L", {16: "split"}, {17: "tiles"}),
        (contract.ROUTED_EXPERTS, EXPERTS, "T", {8: "pairs", 9: "small tiles", 256: "small tiles"}, {257: "tiles"}),
    ],
)
def test_the_size_of_a_call_chooses(
    op: contract.Op, geometry: Any, size: str, few: dict[int, str], many: dict[int, str]
) -> None:
    made = plans(op, geometry, "float16", 87)
    assert {n: choose_plan(made, {**SIZES, size: n}).name for n in (*few, *many)} == {**few, **many}


def test_work_grows_with_the_pairs_not_with_the_experts() -> None:
    def tiles_of(experts: int, tokens: int) -> list[int]:
        made = plans(contract.ROUTED_EXPERTS, {**EXPERTS, "E": experts}, "float16", 90)
        launches = [launch for plan in made for launch in plan.launches if launch.kernel in ("tile_hidden", "pair_hidden")]
        return [
            evaluate(launch.grid[0 if launch.kernel == "tile_hidden" else 1], {**SIZES, "T": tokens}) for launch in launches
        ]

    assert tiles_of(1024, 4) == tiles_of(128, 4) == [8, 8, 8]  # pairs, whatever the tiles
    assert tiles_of(16, 10_000) == [20_000, 1250 + 16, 313 + 16]


def test_a_list_of_blocks_is_bounded_by_the_blocks_there_are() -> None:
    (_, plan) = plans(contract.ROUTED_ATTENTION, ATTENTION, "float16", 90)
    blocks = plan.buffers[0]
    assert (evaluate(blocks.count, {"B": 1, "L": 16, "M": 64}), evaluate(blocks.count, {"B": 1, "L": 16, "M": 2**20})) == (
        10,
        258,
    )


def test_bits_hold_every_position_of_a_tile() -> None:
    for heads, kind in ((8, "int32"), (2, "int64")):
        (_, plan) = plans(contract.ROUTED_ATTENTION, {**ATTENTION, "Hq": heads}, "float16", 90)
        tokens = plan.launches[0].constants["TOKENS"]
        assert plan.buffers[1].kind == kind and tokens <= 8 * contract.DTYPE_BYTES[kind]


@pytest.mark.parametrize(
    ("op", "geometry", "message"),
    [
        (contract.COARSE_ROUTE, {**ROUTE, "topk": 129}, "take topk up to 128, not 129"),
        (contract.ROUTED_ATTENTION, {**ATTENTION, "K": 300}, "take K up to 128, not 300"),
        (contract.ROUTED_ATTENTION, {**ATTENTION, "D": 257}, "take D up to 256, not 257"),
        (contract.ROUTED_ATTENTION, {**ATTENTION, "Dv": 257}, "take Dv up to 256, not 257"),
        (contract.ROUTED_ATTENTION, {**ATTENTION, "Hq": 130}, "65 query heads share a key/value head and a choice; .* take 64"),
        (contract.ROUTED_EXPERTS, {**EXPERTS, "E": 1025}, "take E up to 1024, not 1025"),
    ],
)
def test_what_the_kernels_do_not_cover_is_refused(op: contract.Op, geometry: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=f"{op.name}: .*{message}"):
        plans(op, geometry, "float16", 90)


def test_architectures_without_the_shared_memory_are_left_out() -> None:
    """Attention of 64 heads of 256 in fp32 fits where a program may use more than 99 KB."""
    wide = {**ATTENTION, "Hq": 64, "Hkv": 1, "Hs": 1, "D": 256}
    found = plans_everywhere(contract.ROUTED_ATTENTION, wide, "float32")
    assert 90 in found and 86 not in found
    assert set(plans_everywhere(contract.ROUTED_ATTENTION, ATTENTION, "float16")) == set(tiles.ARCHITECTURES)
    with pytest.raises(ContractError, match="take K up to 128"):
        plans_everywhere(contract.ROUTED_ATTENTION, {**ATTENTION, "K": 300}, "float16")


def test_unknown_types_and_architectures_are_refused() -> None:
    with pytest.raises(ContractError, match="CoarseRoute: the kernels know no float64; give float16, bfloat16, float32"):
        plans(contract.COARSE_ROUTE, ROUTE, "float64", 90)
    with pytest.raises(ContractError, match="no architecture sm_70"):
        plans(contract.COARSE_ROUTE, ROUTE, "float16", 70)


def test_geometry_leaves_out_the_sizes_of_a_call() -> None:
    for op in contract.GPU_OPS:
        for geometry in geometries(op.name):
            assert op.symbols - set(RUNTIME_SIZES) <= set(geometry)
