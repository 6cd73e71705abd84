"""WriteCache's GPU kernel in Triton's interpreter against the loops."""

from __future__ import annotations

import pytest
import torch

from tests.support.operator_calls import int32
from tests.support.triton_calls import check, plans_of, triton_launch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "length", "starts"),
    [
        ((2, 3, 20, 5), 1, (0, 19)),
        ((2, 1, 7, 300), 5, (2, 4)),  # several programs a head; one row's update reaches over the end
        ((1, 2, 4, 8), 4, (0,)),
        ((3, 2, 9, 16), 2, (-1, 9, 2**30)),  # before the cache, at its end, far beyond
        ((2, 2, 3, 4), 0, (0, 1)),
    ],
)
def test_every_place(shape: tuple[int, ...], length: int, starts: tuple[int, ...], dtype: torch.dtype) -> None:
    cache, update = torch.randn(shape).to(dtype), torch.randn(*shape[:2], length, shape[3]).to(dtype)
    check("WriteCache", {"cache": cache, "update": update, "start": int32(*starts)}, {})


def test_in_place_writes_nothing_else() -> None:
    """At one address nothing is copied, and the launch reaches no further than the update."""
    inputs = {"cache": torch.full((1, 2, 4096, 8), 7.0), "update": torch.ones(1, 2, 1, 8), "start": int32(5)}
    (plan,), sizes = plans_of("WriteCache", inputs, {})
    cache = inputs["cache"]
    triton_launch.run_plan(triton_launch.contract.WRITE_CACHE, plan, list(inputs.values()), [cache], torch.empty(0), sizes, {})
    assert (cache[:, :, 5] == 1).all() and int((cache != 7).sum()) == 16
    (launch,) = plan.launches
    assert [triton_launch.evaluate(size, sizes) for size in launch.grid] == [1, 2, 1], "whatever the capacity"
