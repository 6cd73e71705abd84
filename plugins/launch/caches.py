"""The plan of WriteCache (see ``plugins/launch/plans.py``; standard library only)."""

from __future__ import annotations

from bilevel import contract
from bilevel.plugins.launch.launches import Builder, Geometry, LaunchPlan
from bilevel.plugins.launch.tiles import small_tile

_ELEMENTS = 1024  # that one program copies


def plan_write_cache(g: Geometry, dtype: str, arch: int) -> tuple[LaunchPlan, ...]:
    """A launcher has seen to it that ``out`` holds the cache (``Op.in_place``)."""
    width = g["W"]
    launch = Builder(contract.WRITE_CACHE, dtype).launch(
        "caches.write_cache_rows",
        "update start out length capacity",
        {"H": g["H"], "W": width, "COLS": _ELEMENTS},
        (f"ceil_div(L * {width}, {_ELEMENTS})", str(g["H"]), "B"),
        small_tile(4),
    )
    return (LaunchPlan("rows", "", (), (launch,)),)
