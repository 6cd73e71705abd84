"""The packages that a device gets, each pinned, so that pip has nothing left to choose; their wheels, if it has no network."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from bilevel.errors import DeployError
from bilevel.export.deploy.targets import Target

_FILES = Path(__file__).parent / "files"
# glibc of the platform tags that wheels for Linux have (PEP 600).
_OLDEST_GLIBC = 17


def pins(target: Target) -> dict[str, str]:
    """Package -> version: what serves the bundle there, and on a board what builds its engine."""
    names = ("pins-serve.txt", "pins-engine.txt") if target.board else ("pins-serve.txt",)
    found = {}
    for name in names:
        for line in (_FILES / name).read_text(encoding="utf-8").splitlines():
            if line and not line.startswith("#") and _applies(line, target.python):
                package, version = line.partition(";")[0].strip().split("==")
                found[package] = version
    return found | dict(target.board.bindings if target.board else {})


def _applies(line: str, python: str) -> bool:
    """Whether a line counts for a Python. Markers are those of ``constraints.txt``: python_version >= or < '3.11'."""
    marker = line.partition(";")[2].strip()
    if not marker:
        return True
    comparison = re.fullmatch(r"python_version (>=|<) '3\.(\d+)'", marker)
    if comparison is None:
        raise AssertionError(f"{line}: a marker that is not understood here")
    is_later = int(python.split(".")[1]) >= int(comparison[2])
    return is_later == (comparison[1] == ">=")


def requirements_text(target: Target) -> str:
    """The text of ``requirements.txt``."""
    head = f"# For {target.title}, Python {target.python}: every package that is installed, in the version that was chosen.\n"
    return head + "".join(
        f"{name}=={version}\n" for name, version in sorted(pins(target).items(), key=lambda pin: pin[0].lower())
    )


def platform_options(target: Target) -> list[str]:
    """pip's options that make it choose wheels for the target instead of this machine."""
    newest = int(target.glibc.split(".")[1])
    tags = [f"manylinux_2_{minor}_{target.machine}" for minor in range(newest, _OLDEST_GLIBC - 1, -1)]
    options = ["--only-binary=:all:", "--implementation", "cp", "--python-version", target.python]
    return options + [part for tag in (*tags, f"manylinux2014_{target.machine}") for part in ("--platform", tag)]


def download_wheels(target: Target, requirements: Path, folder: Path) -> int:
    """Fetch the wheels of ``requirements`` for the target into ``folder``; how many. Raises DeployError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--dest", str(folder), "--requirement", str(requirements), *platform_options(target)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        errors = [line for line in run.stderr.splitlines() if line.startswith("ERROR:")]
        reason = (errors[-1].removeprefix("ERROR:") if errors else run.stderr.strip()[-200:]).strip() or "no message"
        raise DeployError(f"pip could not fetch the wheels ({reason}); check the network, or leave --with-wheels out")
    return sum(1 for _ in folder.glob("*.whl"))
