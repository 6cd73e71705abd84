"""This package as a wheel for another machine, from whatever is installed here: a wheel, or a checkout.

A wheel is a zip file of the package and of ``NAME-VERSION.dist-info``, whose RECORD holds a hash of every file (PyPA's
"Binary distribution format"). The same sources give the same bytes.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata
import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import bilevel
from bilevel.errors import DeployError

_NAME = "bilevel"
LIBRARY = f"{_NAME}/plugins/_cpu.abi3.so"
_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip file can hold
_LEAST_GLIBC = 17  # of manylinux_2_17, the oldest such tag that pip knows


def wheel_tag(machine: str, glibc: str | None) -> str:
    """ "cp310-abi3-manylinux_2_27_aarch64" where there is a CPU library that asks for glibc 2.27; "py3-none-any" for None."""
    if glibc is None:
        return "py3-none-any"
    return f"cp310-abi3-manylinux_2_{max(_LEAST_GLIBC, int(glibc.split('.')[1]))}_{machine}"


def package_files() -> Iterator[tuple[str, Path]]:
    """(name in the wheel, file) of the package: sources and what lies with them; no library, nothing compiled, no README."""
    root = Path(bilevel.__file__).parent
    for folder, folders, names in os.walk(root, followlinks=True):  # a checkout has links to the other three folders
        folders[:] = sorted(name for name in folders if name != "__pycache__" and not name.startswith("."))
        for name in sorted(names):
            path = Path(folder) / name
            if path.suffix not in (".so", ".pyc", ".md") and not name.startswith("."):
                yield f"{_NAME}/{path.relative_to(root).as_posix()}", path


def _metadata(tag: str) -> dict[str, bytes]:
    """The files of dist-info but RECORD. Raises DeployError where this package is not installed."""
    # A folder of sources on the path may hold an egg-info, which describes no installation and comes first.
    installed = (each for each in importlib.metadata.distributions(name=_NAME) if each.read_text("METADATA"))
    if (distribution := next(installed, None)) is None:
        raise DeployError("bilevel runs here without being installed, so its wheel cannot be made; pip install it first")
    texts = {name: distribution.read_text(name) for name in ("METADATA", "entry_points.txt", "licenses/LICENSE")}
    is_pure = str(tag.endswith("any")).lower()
    texts["WHEEL"] = f"Wheel-Version: 1.0\nGenerator: {_NAME} {bilevel.__version__}\nRoot-Is-Purelib: {is_pure}\nTag: {tag}\n"
    return {name: text.encode() for name, text in texts.items() if text}


def write_wheel(folder: Path, machine: str, library: Path | None, glibc: str | None) -> Path:
    """Write the wheel for a machine into ``folder``; its path.

    library: the CPU kernels for that machine, which ask for ``glibc`` (as in "2.27"); None: the graph's portable bodies run.
    """
    tag = wheel_tag(machine, glibc if library else None)
    stem = f"{_NAME}-{bilevel.__version__}"
    info = f"{stem}.dist-info"
    contents = {name: path.read_bytes() for name, path in package_files()}
    if library is not None:
        contents[LIBRARY] = library.read_bytes()
    contents |= {f"{info}/{name}": content for name, content in _metadata(tag).items()}
    contents[f"{info}/RECORD"] = _record(contents, f"{info}/RECORD")
    path = folder / f"{stem}-{tag}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            entry = zipfile.ZipInfo(name, _DATE)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, (0o755 if name == LIBRARY else 0o644) << 16
            archive.writestr(entry, content)
    return path


def _record(contents: dict[str, bytes], own_name: str) -> bytes:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    for name, content in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.writerow((name, f"sha256={digest}", len(content)))
    rows.writerow((own_name, "", ""))
    return text.getvalue().encode()
