"""Runs of the Triton kernels in Triton's interpreter, every plan of an operator, into poisoned memory."""

from __future__ import annotations

import os
import warnings

import numpy as np
import torch
from torch import Tensor

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is loaded

from bilevel import contract
from bilevel.plugins.kernels import launch as triton_launch
from bilevel.plugins.launch.launches import LaunchPlan
from tests.support.operator_calls import Attributes, Inputs, assert_same, run_reference

_SENTINEL = -7


def plans_of(name: str, inputs: Inputs, attributes: Attributes) -> tuple[tuple[LaunchPlan, ...], dict[str, int]]:
    return triton_launch.plans_for(contract.BY_NAME[name], list(inputs.values()), attributes)


def run_one(plan: LaunchPlan, name: str, inputs: Inputs, attributes: Attributes) -> tuple[list[Tensor], Tensor]:
    """(outputs, workspace) of one plan, whatever its condition says.

    Outputs start as NaN or -7, the workspace as bytes that are NaN and -1.
    """
    op, (_, sizes) = contract.BY_NAME[name], plans_of(name, inputs, attributes)
    dtypes = op.output_dtypes(str(next(iter(inputs.values())).dtype).removeprefix("torch."))
    outputs = [
        torch.full(shape, _SENTINEL if dtype == "int32" else torch.nan, dtype=getattr(torch, dtype))
        for shape, dtype in zip(op.output_shapes(sizes, attributes), dtypes, strict=True)
    ]
    workspace = torch.full((plan.workspace_bytes(sizes),), 255, dtype=torch.uint8)
    # Where values are infinite or NaN, NumPy warns of what the kernels mean to compute.
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        triton_launch.run_plan(op, plan, list(inputs.values()), outputs, workspace, sizes, attributes)
    return outputs, workspace


def run_kernels(name: str, inputs: Inputs, attributes: Attributes, only: str = "") -> dict[str, list[Tensor]]:
    """Plan name -> outputs, of every plan or of ``only`` one."""
    plans, _ = plans_of(name, inputs, attributes)
    return {plan.name: run_one(plan, name, inputs, attributes)[0] for plan in plans if only in ("", plan.name)}


def check(name: str, inputs: Inputs, attributes: Attributes, only: str = "") -> list[Tensor]:
    """The reference's outputs, which every plan's must equal."""
    expected = run_reference(name, inputs, attributes)
    for plan, outputs in run_kernels(name, inputs, attributes, only).items():
        try:
            assert_same(outputs, expected)
        except AssertionError as error:
            raise AssertionError(f"{name}, plan {plan}: {error}") from error
    return expected
