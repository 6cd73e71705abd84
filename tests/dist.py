"""``make dist``: the sdist and the manylinux wheel in ``dist/``, and the proof that each is complete.

The wheel is built from the sdist, in an empty folder, and repaired by auditwheel. What each holds is compared with the
repository's own list of files; each is installed with ``[cpu]`` in an environment of its own, where it runs a bundle far from
the checkout. Needs git, a C++ compiler and what ``make dist`` installs in ``build/dist-tools``.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from tests import ROOT

PACKAGES = ("bilevel", "export", "plugins", "runtime")
CPU_LIBRARY = "bilevel/plugins/_cpu.abi3.so"
SDIST_ONLY = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
# Runs the installed command as its users do, then writes down which files the process holds.
PROBE = """
import json, runpy, sys
report, *sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
with open("/proc/self/maps") as maps:
    files = {line.split(maxsplit=5)[-1].strip() for line in maps if "/" in line}
files |= {module.__file__ for module in sys.modules.values() if getattr(module, "__file__", None)}
with open(report, "w") as file:
    json.dump(sorted(files), file)
"""


def run(command: Sequence[str | Path], cwd: Path = ROOT, **environment: str) -> str:
    """Standard output of a command that has to succeed; the tools' folder comes first in its PATH, no PYTHONPATH reaches it."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{inherited['PATH']}"
    result = subprocess.run(
        command,
        check=False,
        cwd=cwd,
        env={**inherited, "PATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode:
        sys.exit(f"{result.stdout}\ndist: {' '.join(map(str, command))} ended with status {result.returncode}")
    return result.stdout


def build(target: Path) -> tuple[Path, Path]:
    """Write (sdist, wheel) into ``target``."""
    with tempfile.TemporaryDirectory() as folder:
        run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT])
        (sdist,), (wheel,) = Path(folder).glob("*.tar.gz"), Path(folder).glob("*.whl")
        run([sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", target, wheel])
        shutil.copy(sdist, target)
    (wheel,) = target.glob("*.whl")
    run([sys.executable, "-m", "twine", "check", "--strict", wheel, target / sdist.name])
    return target / sdist.name, wheel


def package_files() -> set[str]:
    """The repository's files that belong to the package, as they are named there; nothing that git ignores."""
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES]).splitlines()
    files = [name for name in listed if (ROOT / name).is_file() and not name.endswith(".md")]
    return {name if name.startswith("bilevel/") else f"bilevel/{name}" for name in files}


def check_names(archive: Path, names: Iterable[str], expected: set[str]) -> None:
    """Raises AssertionError that lists what is missing and what is too much; a name that comes twice is too much."""
    names = sorted(names)
    assert len(set(names)) == len(names), f"{archive.name} holds a file twice"
    missing, surplus = sorted(expected - set(names)), sorted(set(names) - expected)
    assert not missing and not surplus, f"{archive.name} lacks {missing} and should not hold {surplus}"
    print(f"dist: {archive.name}: {len(names)} files, {archive.stat().st_size / 1e6:.2f} MB, the repository's and no others")


def check_contents(sdist: Path, wheel: Path) -> None:
    """Both archives hold what they should, and the wheel's tag is that of every Python and an old glibc."""
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert all(member.isfile() or member.isdir() for member in members), "the sdist holds real files, no links"
    names = [member.name.partition("/")[2] for member in members if member.isfile()]
    check_names(sdist, [n for n in names if not n.startswith("bilevel.egg-info/")], package_files() | SDIST_ONLY)
    names = [name for name in zipfile.ZipFile(wheel).namelist() if not fnmatch(name, "bilevel-*.dist-info/*")]
    check_names(wheel, [n for n in names if not n.endswith("/")], package_files() | {CPU_LIBRARY})
    python, abi, machine = wheel.stem.split("-")[-3:]
    assert (python, abi) == ("cp310", "abi3") and "manylinux" in machine and machine.endswith(platform.machine()), wheel.name


def install_and_run(archive: Path, bundle: Path) -> None:
    """Install ``archive[cpu]`` in a fresh environment; it has to write text, with the CPU library, without the checkout."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        run([sys.executable, "-m", "venv", folder / "venv"])
        python, constraints = folder / "venv" / "bin" / "python", str(ROOT / "constraints.txt")
        pins = {"PIP_CONSTRAINT": constraints, "PIP_BUILD_CONSTRAINT": constraints}  # the second for pip's build environments
        run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", f"{archive}[cpu]"], folder, **pins)
        shutil.copytree(bundle, folder / "bundle")
        command = [
            folder / "venv" / "bin" / "bilevel",
            "run",
            folder / "bundle",
            "def read_lines(path):",
            "--max-tokens",
            "32",
            "--json",
        ]
        output = run([python, "-c", PROBE, folder / "files.json", *command], folder, PYTHONSAFEPATH="1")
        text = json.loads(output)["completions"][0]["text"]
        files = {Path(file).resolve() for file in json.loads((folder / "files.json").read_text(encoding="utf-8"))}
        installed = next((folder / "venv" / "lib").glob("python*")) / "site-packages"
        assert text.strip(), output
        assert installed / CPU_LIBRARY in files, f"{archive.name}: the CPU library is not in use"
        assert not [file for file in files if ROOT in file.parents], f"{archive.name}: the checkout is in use"
    print(f"dist: {archive.name}: installed alone it writes {text.strip().splitlines()[0]!r}, with its CPU library")


def main(bundle: Path) -> None:
    """Build, check, install and run."""
    target = ROOT / "dist"
    shutil.rmtree(target, ignore_errors=True)
    sdist, wheel = build(target)
    check_contents(sdist, wheel)
    for archive in (sdist, wheel):
        install_and_run(archive, bundle)
    print(f"dist: {sdist.relative_to(ROOT)} and {wheel.relative_to(ROOT)} are ready")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
