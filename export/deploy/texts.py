"""The scripts and texts of a deployment folder: the files in ``files/`` with @NAMES@ replaced."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import bilevel
from bilevel.bundle.format import Bundle
from bilevel.export.deploy.targets import Target

_FILES = Path(__file__).parent / "files"
_ENGINE_USAGE = (
    "./run.sh engine             build TensorRT's engine for this GPU (options: bilevel build --help); serve then takes it\n"
)
_ENGINE_CASE = """\
  engine)
    install
    exec "$venv/bin/python" -I -m bilevel.runtime.cli.main build "$bundle" --backend tensorrt "${@:2}"
    ;;
"""
_ENGINE_STEP = """\
   Then `./run.sh engine --capacity 8192` builds TensorRT's engine for this GPU; without one the CPU computes.
"""
NO_GPU = "the GPU"  # what is missing where a bundle can have no engine
_CONTAINER = """
Instead of steps 2 to 4: the first lines of `Dockerfile`. Its server listens inside the container, whose name clients do not
know: add `--allow-host NAME`.
"""


@dataclass(frozen=True)
class Missing:
    """What a folder lacks: what, why, and the command or step that brings it. stops: the bundle cannot start without it."""

    what: str
    why: str
    remedy: str
    stops: bool = False


def _fill(name: str, values: Mapping[str, str]) -> str:
    text = (_FILES / name).read_text(encoding="utf-8")
    return re.sub(r"@([A-Z_]+)@", lambda place: values[place[1]], text)


def _tried(target: Target) -> str:
    if target.board:
        return (
            f"Nothing on {target.title}: GPU kernels, plugins and engines have been compiled and tested without a GPU, and "
            "executed on none. bilevel's CPU path has run on x86-64, and for ARM in an emulator. This script, the unit and the "
            "container recipe have not been started on the board."
        )
    if target.machine == "x86_64":
        return "Folders of this kind are installed, started and asked for text by bilevel's tests on x86-64."
    return (
        "Folders of this kind have run in an emulator (qemu-user): packages, CPU kernels, text of the example model. None has "
        "been started on an ARM machine."
    )


def _needs(target: Target) -> str:
    text = f"{target.machine} Linux with glibc {target.glibc} or newer and Python {target.python} with its module venv"
    if board := target.board:
        text += f"; for the GPU CUDA {'.'.join(map(str, board.cuda))} and TensorRT {board.tensorrt} with its Python module"
    return text


def _checked(bundle: Bundle) -> str:
    passed = [check for check in bundle.checks if check.get("passed") is True]
    return " (this bundle's manifest records a check that passed)" if passed else " (this bundle's manifest records none)"


def write_texts(folder: Path, name: str, target: Target, bundle: Bundle, wheel: str, missing: Sequence[Missing]) -> None:
    """Write run.sh, bilevel.service, README.md and on a board Dockerfile. name: the folder's, as it will be on the device."""
    board, has_wheels = target.board, (folder / "wheels").is_dir()
    takes_engine = board is not None and not any(each.what == NO_GPU for each in missing)
    values = {
        "NAME": name,
        "TITLE": target.title,
        "MACHINE": target.machine,
        "PYTHON": target.python,
        "PYTHON_TUPLE": target.python.replace(".", ", "),
        "BACKEND": target.backend,
        "WHEEL": wheel,
        "VENV_OPTIONS": "--system-site-packages " if board else "",
        "ENGINE_USAGE": _ENGINE_USAGE if board else "",
        "ENGINE_CASE": _ENGINE_CASE if board else "",
        "ENGINE_STEP": _ENGINE_STEP if takes_engine else "",
        "CONTAINER": _CONTAINER if board else "",
        "IMAGE": board.image if board else "",
        "VERSION": bilevel.__version__,
        "NEEDS": _needs(target),
        "OUTSIDE": ", but for the kernel library's hash in `~/.local/state/bilevel`" if board else "",
        "SOURCE": "from `wheels/`, without a network" if has_wheels else "with pip, from the network",
        "CHECKED": _checked(bundle),
        "MISSING": "\n".join(f"- {each.what}: {each.why}. {each.remedy}" for each in missing) or "Nothing.",
        "TRIED": _tried(target),
    }
    names = {"run.sh": "run.sh", "bilevel.service": "bilevel.service", "readme.txt": "README.md"}
    if board:
        names |= {"Dockerfile": "Dockerfile", "dockerignore": ".dockerignore"}
    for source, place in names.items():
        (folder / place).write_text(_fill(source, values), encoding="utf-8")
    (folder / "run.sh").chmod(0o755)
