"""What a user names as the model to export: a checkpoint folder, a GGUF file, or a model's name on the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bilevel.errors import CheckpointError, ExportError, require
from bilevel.folders import scratch

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# What a checkpoint may consist of; the Hub's repositories hold other formats of the same weights beside it.
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "heldout.txt")


@contextmanager
def checkpoint_folder(source: Path, beside: Path, on_stage: Callable[[str], None]) -> Iterator[Path]:
    """The checkpoint folder that ``source`` stands for. Raises BilevelError where it stands for none.

    A GGUF file is imported into a folder next to ``beside``, which is removed afterwards; a name on the Hub is looked up in
    the local cache and downloaded into it.
    """
    if source.is_dir():
        yield source
    elif source.is_file():
        for name in ("gguf", "tokenizers"):
            require(name)
        from bilevel.export.gguf.convert import import_gguf

        if not beside.parent.is_dir():
            beside.parent.mkdir(parents=True)
        with scratch(beside.parent, source.name) as folder:
            import_gguf(source, folder / "checkpoint", on_stage=on_stage)
            yield folder / "checkpoint"
    elif _HUB_NAME.fullmatch(str(source)) and not source.parent.exists():
        yield _downloaded(str(source), on_stage)
    else:
        raise ExportError(
            f"{source} is no folder and no file; give a checkpoint folder (config.json, model.safetensors), a .gguf file, "
            "or a model's name on the Hugging Face Hub (organisation/name)"
        )


def _downloaded(name: str, on_stage: Callable[[str], None]) -> Path:
    """The folder of a model of the Hub, in the local cache (HF_HOME). Raises CheckpointError."""
    hub = require("huggingface_hub")
    from huggingface_hub import errors

    on_stage(f"downloading {name}")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except errors.GatedRepoError:
        reason = "asks for its terms to be accepted; accept them on its page and log in with: hf auth login"
    except errors.RepositoryNotFoundError:
        reason = "is not on the Hugging Face Hub, or is private; check the name, or log in with: hf auth login"
    except errors.LocalEntryNotFoundError:
        reason = "is not in the local cache and the Hugging Face Hub cannot be reached; connect to it, or give a folder"
    except (errors.HfHubHTTPError, OSError) as error:
        reason = f"could not be downloaded ({str(error).splitlines()[0][:200]}); try again, or give a folder or a .gguf file"
    raise CheckpointError(f"{name} is no local folder and {reason}") from None
