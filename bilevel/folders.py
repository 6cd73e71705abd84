"""Writing files and folders so that their names only ever stand for something complete; reading small files that hold anything.

Only regular files are opened: a FIFO would be waited for, a device may act. What is wrong with one is a clause to put behind
its name ("is not UTF-8 (byte 3)"). Files that hold weights are read elsewhere, piece by piece.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bilevel.errors import BilevelError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_MOST_BYTES = 256 << 20  # of a text; tokenizers of large vocabularies have tens of MB


def check_regular(path: Path) -> None:
    """Raises ValueError ("is a FIFO, not a file") for anything but a file, OSError where there is none."""
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        return
    kinds = {
        stat.S_IFIFO: "FIFO",
        stat.S_IFSOCK: "socket",
        stat.S_IFDIR: "folder",
        stat.S_IFCHR: "device",
        stat.S_IFBLK: "device",
    }
    raise ValueError(f"is a {kinds.get(stat.S_IFMT(mode), 'special file')}, not a file")


def read_text(path: Path) -> str:
    """A file's text. Raises OSError where it cannot be read, ValueError where it is no text: a clause behind its name."""
    try:
        return _read(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start})") from None


def _read(path: Path) -> str:
    check_regular(path)
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise ValueError(f"holds {size} bytes, and at most {_MOST_BYTES} are read")
    return path.read_text(encoding="utf-8")


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises as ``read_text`` does; a ValueError too where it is no JSON that can be read."""
    try:
        return json.loads(_read(path))
    except RecursionError:
        raise ValueError("is not valid JSON (it is nested too deep)") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"is not valid JSON (byte {error.start} is not UTF-8)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON ({error})") from None
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise ValueError("is not valid JSON (it holds a number of thousands of digits)") from None
        raise


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits; the file is read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one step: what ``path`` held stays whole until then. Raises OSError."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step (Linux renameat2); False where the system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def sweep(parent: Path, name: str = "*") -> None:
    """Remove what writers left in ``parent`` when they were killed: of files and folders of this name, or of all.

    A folder that was about to be replaced, and has only its second name, gets its own back.
    """
    with suppress(OSError):
        for path in [*parent.glob(f".{name}.partial-*"), *parent.glob(f".{name}.previous-*")]:
            _sweep(path)


def _sweep(path: Path) -> None:
    owner, _, pid = path.name[1:].rpartition("-")
    own, _, kind = owner.rpartition(".")
    if not pid.isdecimal() or _is_running(pid) or _is_locked(path):
        return
    if kind == "previous" and not path.with_name(own).exists():
        path.rename(path.with_name(own))
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_locked(path: Path) -> bool:
    """Whether somebody writes in a folder whose process this one cannot see, as from another container."""
    try:
        with locked(path):
            return False
    except OSError:
        return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a folder or a file. Raises OSError where another process holds it."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with suppress(ImportError):  # where there is no fcntl, ids of processes have to do
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(file)


@contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """A folder for what is needed in between, which ``sweep`` finds where this process is killed. Raises OSError."""
    sweep(parent)
    folder = parent / f".{name}.partial-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(partial: Path, folder: Path) -> None:
    """Give ``partial`` the name of ``folder``; what had that name before ends up under ``partial`` or is gone."""
    if not folder.exists():
        partial.rename(folder)
    elif not _exchange(partial, folder):
        # Without an atomic swap the old folder has, for an instant, only its second name.
        previous = folder.with_name(f".{folder.name}.previous-{os.getpid()}")
        folder.rename(previous)
        try:
            partial.rename(folder)
        except OSError:
            previous.rename(folder)
            raise
        shutil.rmtree(previous, ignore_errors=True)


@contextmanager
def replacing(folder: Path, error: type[BilevelError]) -> Iterator[Path]:
    """A new empty sibling folder that takes ``folder``'s name when the block has succeeded.

    Whatever happens before, a kill included, what ``folder`` held stays whole. A failing disk raises ``error``.
    """
    folder = Path(folder).resolve()
    try:
        with scratch(folder.parent, folder.name) as partial:
            yield partial
            _put_in_place(partial, folder)
    except OSError as problem:
        remedy = "free some space and try again" if problem.errno == errno.ENOSPC else "check its permissions and its disk"
        raise error(f"{folder} could not be written ({problem.strerror or problem}); {remedy}") from problem


def check_within(path: Path, checkpoint: Path, error: type[BilevelError]) -> None:
    """Refuse a link to somewhere else, whose target's contents would be copied. The Hub's cache links to its blobs."""
    target, folder = path.resolve(), checkpoint.resolve()
    places = [folder, folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [folder]
    if not any(target.is_relative_to(place) for place in places):
        raise error(f"{path} is a link to {target}, outside of the checkpoint; put a copy of the file in its place")
