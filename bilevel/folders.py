"""Writing files and folders so that their names only ever stand for something complete, and the hash of a file."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bilevel.errors import BilevelError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


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


def _remove_leftovers(folder: Path) -> None:
    """What an earlier writer left when it was killed."""
    for path in folder.parent.glob(f".{folder.name}.partial-*"):
        if not _is_running(path.name.rsplit("-", 1)[-1]):
            shutil.rmtree(path, ignore_errors=True)


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
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        with suppress(FileNotFoundError):
            _remove_leftovers(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        _put_in_place(partial, folder)
    except OSError as problem:
        remedy = "free some space and try again" if problem.errno == errno.ENOSPC else "check its permissions and its disk"
        raise error(f"{folder} could not be written ({problem.strerror or problem}); {remedy}") from problem
    finally:
        shutil.rmtree(partial, ignore_errors=True)
