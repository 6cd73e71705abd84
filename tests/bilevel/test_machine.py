"""What this machine has: memory under every kind of limit, and whose machine code a GPU runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bilevel.machine import available_memory, runs_on

MIB = 2**20
FREE = {"proc/meminfo": f"MemTotal: {16 << 20} kB\nMemFree:  1024 kB\nMemAvailable:    {1000 << 10} kB\n"}
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"
NO_LIMIT = 9223372036854771712  # what v1 says where there is none


def group(folder: str, limit: int | str, used: int, cached: int = 0) -> dict[str, str]:
    """A control group's files; sizes in MiB."""
    size = str(limit * MIB) if isinstance(limit, int) and limit < NO_LIMIT else str(limit)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if folder.startswith(V1) else ("memory.max", "memory.current")
    kind = "total_inactive_file" if folder.startswith(V1) else "inactive_file"
    stat = f"anon 5\nactive_file 7\n{kind} {cached * MIB}\n"
    return {f"{folder}/{names[0]}": f"{size}\n", f"{folder}/{names[1]}": f"{used * MIB}\n", f"{folder}/memory.stat": stat}


MACHINES: dict[str, tuple[dict[str, str], int]] = {
    "no limit": (FREE, 1000),
    "v2": ({**FREE, **group(V2, 500, 100)}, 400),
    "v2: max": ({**FREE, **group(V2, "max", 100)}, 1000),
    "v2: more than there is": ({**FREE, **group(V2, 9000, 100)}, 1000),
    "v2: more used than allowed": ({**FREE, **group(V2, 500, 501)}, 0),
    "v2: pages of files come back": ({**FREE, **group(V2, 500, 400, cached=300)}, 400),
    "v2: nested": (
        {
            **FREE,
            "proc/self/cgroup": "0::/user.slice/job\n",
            **group(f"{V2}/user.slice", 700, 500),
            **group(f"{V2}/user.slice/job", "max", 400),
        },
        200,
    ),
    "v2: nested, the inner one is tighter": (
        {
            **FREE,
            "proc/self/cgroup": "0::/user.slice/job\n",
            **group(f"{V2}/user.slice", 700, 500),
            **group(f"{V2}/user.slice/job", 450, 400),
        },
        50,
    ),
    "v2: another group's limit": (
        {**FREE, "proc/self/cgroup": "0::/user.slice\n", **group(f"{V2}/user.slice/job", 10, 0)},
        1000,
    ),
    "v2: the path is the outside's": ({**FREE, "proc/self/cgroup": "0::/../../job\n", **group(V2, 300, 0)}, 300),
    "v2: only half of the files": ({**FREE, f"{V2}/memory.max": f"{5 * MIB}\n"}, 1000),
    "v1": ({**FREE, "proc/self/cgroup": "9:memory:/\n3:cpu,cpuacct:/\n0::/\n", **group(V1, 600, 100)}, 500),
    "v1: no limit": ({**FREE, "proc/self/cgroup": "9:memory:/\n", **group(V1, NO_LIMIT, 100)}, 1000),
    "v1: pages of files come back": (
        {**FREE, "proc/self/cgroup": "9:memory:/\n", **group(V1, 500, 400, cached=100)},
        200,
    ),
    "v1: nested": (
        {
            **FREE,
            "proc/self/cgroup": "9:hugetlb,memory:/docker/ab\n",
            **group(f"{V1}/docker/ab", 300, 50),
            **group(V1, NO_LIMIT, 0),
        },
        250,
    ),
    "v1: the path is the outside's": (
        {**FREE, "proc/self/cgroup": "9:memory:/docker/ab\n0::/\n", **group(V1, 300, 50)},
        250,
    ),
}


@pytest.mark.parametrize("files, expected", MACHINES.values(), ids=MACHINES)
def test_available_memory(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="ascii")
    assert available_memory(tmp_path) == expected * MIB


def test_a_system_without_proc_has_its_physical_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert available_memory(tmp_path) == physical
    assert 0 < (available_memory() or 0) <= physical
    monkeypatch.delattr(os, "sysconf")
    assert available_memory(tmp_path) is None


CAPABILITIES = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)
RUNS = {80: (80, 86, 89), 86: (86, 89)}  # every other on its own only


@pytest.mark.parametrize("code", CAPABILITIES)
def test_whose_code_runs_where(code: int) -> None:
    assert tuple(each for each in CAPABILITIES if runs_on(code, each)) == RUNS.get(code, (code,))
