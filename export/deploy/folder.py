"""The deployment folder: everything in its place, listed with its hash in ``deploy.json``.

bundle/            the bundle; on a board with kernels/MACHINE/libbilevel_kernels.so
bilevel-....whl    this package, with the CPU kernels for the target
requirements.txt   every package, pinned; wheels/ holds them where the device has no network
run.sh             installs and starts; bilevel.service, README.md, on a board Dockerfile
deploy.json        format "bilevel-deploy", format_version 1, created_by {tool: version}, target, title, machine, python,
                   backend, board (null, or {arch, cuda, tensorrt, image}), precision, cpu_library (null, or {origin,
                   needs {GLIBC, GLIBCXX}}), starts_on_cpu, missing [{what, why, remedy, stops}], files {name: {sha256,
                   bytes}} of every other file
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import bilevel
from bilevel.bundle.format import Bundle, read_manifest
from bilevel.bundle.manifest import MANIFEST
from bilevel.errors import BundleError, DeployError
from bilevel.export.deploy.libraries import GPU_NAME, CpuLibrary, cpu_library, gpu_library
from bilevel.export.deploy.requirements import download_wheels, requirements_text
from bilevel.export.deploy.targets import Target
from bilevel.export.deploy.texts import NO_GPU, Missing, write_texts
from bilevel.export.deploy.wheel import write_wheel
from bilevel.folders import file_sha256, replacing, scratch
from bilevel.plugins.library.gpu import distrust_problem

LISTING = "deploy.json"
FORMAT, FORMAT_VERSION = "bilevel-deploy", 1
_ARCHIVE = ".tar.gz"
_ALREADY_PACKED = ".tar.zst"
_DATE = 315_532_800  # 1980-01-01, as in the wheel: the same content gives the same archive


@dataclass(frozen=True)
class Deployment:
    """What was written: the folder or archive, its bytes on disk, and deploy.json."""

    path: Path
    num_bytes: int
    manifest: dict[str, object]
    missing: tuple[Missing, ...]

    @property
    def starts(self) -> bool:
        """Whether the device can start it, on its CPU at least."""
        return not any(each.stops for each in self.missing)


def folder_name(out: Path) -> str:
    """The name of the folder on the device. Raises DeployError for one that a unit or an image cannot have."""
    name = out.name.removesuffix(_ARCHIVE)
    if out.name.endswith(_ALREADY_PACKED):
        raise DeployError(
            f"{out}: no zstd in Python's standard library; end the name in {_ARCHIVE}, or pack a folder: tar --zstd"
        )
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise DeployError(
            f"{out.name!r} must consist of a-z, 0-9, - and _, and may end in {_ARCHIVE}: the service is called so"
        )
    return name


def check_out(out: Path, bundle: Path, force: bool) -> None:
    """Refuse a place where something would be lost. Raises DeployError."""
    if out.resolve().is_relative_to(bundle.resolve()) or bundle.resolve().is_relative_to(out.resolve()):
        raise DeployError(f"{out} lies in {bundle}, or around it; choose a place beside it")
    if not out.exists():
        return
    if not force:
        raise DeployError(f"{out} exists; choose another name or replace it with --force")
    is_own = (
        out.is_file() if out.name.endswith(_ARCHIVE) else out.is_dir() and (not any(out.iterdir()) or (out / LISTING).is_file())
    )
    if not is_own:
        raise DeployError(f"{out} exists and was not written by bilevel deploy, so --force does not replace it; move it away")


def copy_bundle(bundle: Bundle, folder: Path) -> None:
    """The bundle's own files as hard links, or copies on another file system; each is compared with its SHA-256.

    Raises BundleError for a file that is missing or differs, DeployError for native code that this user did not choose.
    """
    for name in bundle.files:
        source, place = (bundle.folder / name).resolve(), folder / name
        if name.split("/")[0] == "kernels" and source.is_file() and (distrust := distrust_problem(source)):
            raise DeployError(f"{distrust.partition(';')[0]}; trust it: bilevel kernels trust {bundle.folder / name}")
        place.parent.mkdir(parents=True, exist_ok=True)
        if not source.is_file():
            raise BundleError(f"{bundle.folder}: {name} is missing; {bundle.remedy}")
        try:
            os.link(source, place)
        except OSError:
            shutil.copyfile(source, place)
    shutil.copyfile(bundle.folder / MANIFEST, folder / MANIFEST)
    copied = dataclasses.replace(bundle, folder=folder)
    for name in bundle.files:
        if problem := copied.file_problem(name):
            raise BundleError(f"{bundle.folder}: {name} {problem}; {bundle.remedy}")


def has_floats(bundle: Bundle) -> bool:
    """Whether an engine can be built of it: TensorRT reads neither ONNX Runtime's integer weights nor packed caches."""
    return bundle.weights.get("format", "fp32") == "fp32" and bundle.caches == "fp32"


def bundle_gaps(bundle: Bundle, target: Target) -> list[Missing]:
    """What the bundle itself stands in the way of."""
    gaps = []
    if bundle.precision == "bfloat16":
        why = "the bundle is bf16, which ONNX Runtime does not compute on a CPU"
        gaps.append(Missing("a start on the CPU", why, "Export it with --precision fp32 or fp16", stops=True))
    if target.board and has_floats(bundle):
        why = "a plan is built by the device's own TensorRT on its GPU; until then the CPU computes"
        gaps.append(Missing("TensorRT engine", why, "Build one there: ./run.sh engine --capacity 8192"))
    elif target.board:
        why = "TensorRT reads neither int8 and int4 weights nor packed caches of this bundle, so that the CPU computes"
        gaps.append(Missing(NO_GPU, why, "Export it with --precision fp16, without --weights and --kv"))
    return gaps


def fill_folder(
    folder: Path, name: str, bundle: Bundle, target: Target, *, wheels: bool, build: bool, on_stage: Callable[[str], None]
) -> tuple[dict[str, object], list[Missing]]:
    """Write everything into the empty ``folder``; (deploy.json, what is missing). Raises BilevelError."""
    on_stage("comparing the bundle with its SHA-256")
    copy_bundle(bundle, folder / "bundle")
    missing: list[Missing] = []
    with scratch(folder, "build") as work:
        library = cpu_library(target, work, on_stage)
        if isinstance(library, Missing):
            missing.append(library)
            wheel = write_wheel(folder, target.machine, None, None)
        else:
            wheel = write_wheel(folder, target.machine, library.path, library.needs.get("GLIBC", "2.17"))
    if target.board and has_floats(bundle):
        place = folder / "bundle" / "kernels" / target.machine / GPU_NAME
        missing += gpu_library(bundle, target, target.board, place, build, on_stage)
    missing += bundle_gaps(bundle, target)
    (folder / "requirements.txt").write_text(requirements_text(target), encoding="utf-8")
    if wheels:
        on_stage("fetching the packages' wheels")
        download_wheels(target, folder / "requirements.txt", folder / "wheels")
    write_texts(folder, name, target, bundle, wheel.name, missing)
    manifest = _manifest(folder, bundle, target, library, missing)
    (folder / LISTING).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest, missing


def _manifest(
    folder: Path, bundle: Bundle, target: Target, library: CpuLibrary | Missing, missing: list[Missing]
) -> dict[str, object]:
    board = target.board
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "created_by": {"bilevel": bilevel.__version__},
        "target": target.name,
        "title": target.title,
        "machine": target.machine,
        "python": target.python,
        "backend": target.backend,
        "board": None
        if board is None
        else {"arch": board.arch, "cuda": ".".join(map(str, board.cuda)), "tensorrt": board.tensorrt, "image": board.image},
        "precision": bundle.precision,
        "cpu_library": {"origin": library.origin, "needs": library.needs} if isinstance(library, CpuLibrary) else None,
        "starts_on_cpu": not any(each.stops for each in missing),
        "missing": [asdict(each) for each in missing],
        "files": {
            name: {"sha256": file_sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in list_files(folder)
        },
    }


def list_files(folder: Path) -> list[str]:
    """Every file of a folder but deploy.json, by its path in it."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != LISTING)


@contextmanager
def _place(out: Path, name: str) -> Iterator[Path]:
    """An empty folder that becomes ``out``, or what is packed into the archive ``out``, when the block has succeeded."""
    if not out.name.endswith(_ARCHIVE):
        with replacing(out, DeployError) as folder:
            yield folder
        return
    try:
        with scratch(out.resolve().parent, out.name) as work:
            (work / name).mkdir()
            yield work / name
            _pack(work / name, work / out.name)
            (work / out.name).replace(out)
    except OSError as error:
        raise DeployError(f"{out} could not be written ({error.strerror or error}); check its folder and its disk") from error


def _pack(folder: Path, archive: Path) -> None:
    """A .tar.gz of a folder, whose files belong to nobody in particular."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        entry.mtime = _DATE
        return entry

    # Weights hardly become smaller: the fastest level.
    with tarfile.open(archive, "w:gz", compresslevel=1, dereference=True) as file:
        file.add(folder, folder.name, filter=plain)


def deploy(
    bundle_path: Path,
    out: Path,
    target: Target,
    *,
    force: bool = False,
    wheels: bool = False,
    build: bool = True,
    on_stage: Callable[[str], None] = lambda text: None,
) -> Deployment:
    """Write the folder, or with a name that ends in .tar.gz the archive, for a target. Until then ``out`` stays as it was.

    wheels: fetch the packages' wheels too. build: make GPU kernels that the bundle does not hold. on_stage(text): what is being
    done. Raises BundleError, DeployError.
    """
    name = folder_name(out)
    bundle = read_manifest(bundle_path)
    check_out(out, bundle_path, force)
    with _place(out, name) as folder:
        manifest, missing = fill_folder(folder, name, bundle, target, wheels=wheels, build=build, on_stage=on_stage)
        size = sum(record["bytes"] for record in manifest["files"].values())  # type: ignore[attr-defined]
    return Deployment(out, out.stat().st_size if out.is_file() else size, manifest, tuple(missing))
