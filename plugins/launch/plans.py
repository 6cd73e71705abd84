"""The plans of each operator: geometry -> kernels, constants, arguments, grids, workspace (standard library only).

``plans(op, geometry, dtype, arch)`` is the entry; ``plugins/launch/launches.py`` explains what a plan holds. Geometry: the
attributes, and every size of the contract except those of RUNTIME_SIZES, which belong to a call.
"""

from __future__ import annotations

from bilevel import contract
from bilevel.errors import ContractError
from bilevel.plugins.launch import caches, experts, routing
from bilevel.plugins.launch.launches import Geometry, LaunchPlan
from bilevel.plugins.launch.tiles import ARCHITECTURES, shared_limit

RUNTIME_SIZES = ("B", "L", "U", "M", "T")
# A program holds a position's whole choice, a row of a head and a token's expert scores in registers.
LIMITS = {"K": 128, "topk": 128, "D": 256, "Dv": 256, "E": 1024, "top_k": 128}
_MAKERS = {
    "CoarseRoute": routing.plan_coarse_route,
    "FineRoute": routing.plan_fine_route,
    "SelectBlocks": routing.plan_select_blocks,
    "RoutedAttention": routing.plan_routed_attention,
    "ExpertRoute": experts.plan_expert_route,
    "RoutedExperts": experts.plan_routed_experts,
    "WriteCache": caches.plan_write_cache,
}


def plans(op: contract.Op, geometry: Geometry, dtype: str, arch: int) -> tuple[LaunchPlan, ...]:
    """How ``op`` runs for a geometry, a data type ("float16", "bfloat16", "float32") and an architecture as in 87.

    Raises ContractError for what the kernels do not cover.
    """
    shared_limit(arch)
    if op.name not in _MAKERS:
        raise ContractError(f"{op.name} has no GPU kernels; on a GPU its PyTorch form or its portable body runs")
    if dtype not in contract.FLOAT_TYPES:
        raise ContractError(f"{op.name}: the kernels know no {dtype}; give {', '.join(contract.FLOAT_TYPES)}")
    for name, most in LIMITS.items():
        if geometry.get(name, 0) > most:
            raise ContractError(
                f"{op.name}: the kernels take {name} up to {most}, not {geometry[name]}; the PyTorch form has no limit"
            )
    return _MAKERS[op.name](geometry, dtype, arch)


def plans_everywhere(op: contract.Op, geometry: Geometry, dtype: str) -> dict[int, tuple[LaunchPlan, ...]]:
    """Architecture -> plans, for every architecture that has the shared memory. Raises ContractError where none does."""
    planned, problem = {}, None
    for arch in ARCHITECTURES:
        try:
            planned[arch] = plans(op, geometry, dtype, arch)
        except ContractError as error:
            problem = error
    if problem is not None and not planned:
        raise problem
    return planned
