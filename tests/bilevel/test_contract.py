"""What the contract says of an operator's outputs, and of sizes that are no numbers yet."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bilevel import contract
from bilevel.contract import Dim
from bilevel.errors import ContractError
from tests.support.operator_calls import make_call, run_reference


@pytest.mark.parametrize("name", contract.BY_NAME)
def test_shapes_and_dtypes_are_those_of_the_reference(name: str) -> None:
    op, (inputs, attributes) = contract.BY_NAME[name], make_call(name)
    sizes = op.bind_shapes([x.shape for x in inputs.values()])
    outputs = run_reference(name, inputs, attributes)
    assert op.output_shapes(sizes, attributes) == [tuple(out.shape) for out in outputs]
    assert [getattr(torch, dtype) for dtype in op.output_dtypes("float32")] == [out.dtype for out in outputs]
    assert op.input_shapes(sizes) == [tuple(x.shape) for x in inputs.values()]
    assert set(sizes) == op.symbols


def test_a_float_type_stands_for_t_and_fp64_for_fp32_too() -> None:
    assert contract.ROUTED_ATTENTION.output_dtypes("bfloat16") == ["bfloat16"]
    assert contract.EXPERT_ROUTE.output_dtypes("bfloat16") == ["int32", "float32"]
    assert contract.EXPERT_ROUTE.output_dtypes("float64") == ["int32", "float64"]
    assert [op.name for op in contract.GPU_OPS if not op.has_float_type] == ["SelectBlocks", "ExpertRoute"]


def test_sizes_that_are_no_numbers_are_bound_and_not_compared() -> None:
    """torch's SymInts and TensorRT's expressions: comparing them would fix them."""

    class Free:
        def __eq__(self, other: object) -> bool:
            raise AssertionError("compared")

        __ne__, __hash__ = __eq__, object.__hash__

    op, length = contract.WRITE_CACHE, Free()
    shapes = [(2, 3, Free(), 5), (2, 3, length, 5), (Free(),)]
    assert op.bind_shapes(shapes)["L"] is length
    doubled = contract.ROUTED_EXPERTS.bind_shapes([(4, 6), (4, 2), (4, 2), (8, Free(), 6), (8, 6, Free())])
    assert doubled["E"] == 8


def test_every_output_has_its_sizes() -> None:
    """A symbol of an output is that of an input, or an attribute of the operator gives its size."""
    for op in contract.GPU_OPS:
        names = {attribute.name for attribute in op.attributes}
        for dim in (dim for port in op.outputs for dim in port.shape):
            assert (dim.sized_by in names) if dim.sized_by else (dim.symbol in op.symbols), f"{op.name}: {dim}"
        assert not [dim for port in op.inputs for dim in port.shape if dim.sized_by]


def test_a_factor_multiplies() -> None:
    assert [str(dim) for dim in (Dim("f"), Dim("f", 2))] == ["f", "2f"]
    assert Dim("f", 2).size({"f": 5}) == 10
    wide = replace(contract.ROUTED_EXPERTS.inputs[3], shape=(Dim("E"), Dim("f", 12), Dim("d")))
    op = replace(contract.ROUTED_EXPERTS, inputs=(*contract.ROUTED_EXPERTS.inputs[:3], wide, contract.ROUTED_EXPERTS.inputs[4]))
    assert op.bind_shapes([(4, 6), (4, 2), (4, 2), (8, 36, 6), (8, 6, 3)])["f"] == 3
    with pytest.raises(ContractError, match="gate_up has 12f=35, but f=3 elsewhere"):
        op.bind_shapes([(4, 6), (4, 2), (4, 2), (8, 35, 6), (8, 6, 3)])
