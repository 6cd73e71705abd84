"""The package's exceptions (standard library only, so that every folder may raise them).

BilevelError                 every error a caller may cause; its message is one sentence with the remedy
├── ContractError            an operator was given shapes or attributes outside its contract
├── ConfigError              a model or routing configuration with unknown or contradictory values
├── CheckpointError          a checkpoint that is damaged, incomplete, or holds tensors nobody consumes
├── ExportError              a model that cannot be exported as it is
├── BundleError              a bundle that is damaged or of another format
├── EngineError              an engine that is damaged, or does not run here
├── KernelError              a kernel library cannot be built or used, or refuses a call
├── RequestError             a prompt or sampling setting that cannot be served
│   └── ContextTooLong       a prompt, with the tokens asked for, that is longer than a row
├── Overloaded               a server's queue is full
├── ShuttingDown             a server that takes no more requests
├── DeadEnd                  a grammar after which no token of the vocabulary may come
└── MissingDependency        an optional package is not installed
"""

from __future__ import annotations

import importlib
import unicodedata
from types import ModuleType

_EXTRAS = {
    "jinja2": "cpu",
    "onnxruntime": "cpu",
    "tokenizers": "cpu",
    "rich": "cpu",
    "torch": "export",
    "ml_dtypes": "export",
    "onnx": "export",
    "onnxscript": "export",
    "safetensors": "export",
    "polygraphy": "export",
    "gguf": "gguf",
    "accelerate": "examples",
    "django": "examples",
    "polib": "examples",
    "sacrebleu": "examples",
    "huggingface_hub": "hub",
    "llguidance": "serve",
    "prometheus_client": "serve",
    "pydantic": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "matplotlib": "dev",
    "triton": "kernels",
    "cuda": "gpu",
}


_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format (the bidirectional ones among them), halves, line separators


_LONGEST = 2000  # characters of a sentence: values from files may have any number


class BilevelError(Exception):
    """Base of every error that a caller may cause. Its message is one line, the middle of a very long one left out."""

    def __init__(self, message: object = "") -> None:
        sentence = " ".join(str(message).split("\n"))
        half = _LONGEST // 2
        super().__init__(sentence if len(sentence) <= _LONGEST else f"{sentence[:half]} [...] {sentence[-half:]}")


class ContractError(BilevelError):
    """An operator was given shapes or attributes outside its contract."""


class ConfigError(BilevelError):
    """A configuration with unknown or contradictory values."""


class CheckpointError(BilevelError):
    """A checkpoint that is damaged, incomplete, or holds tensors nobody consumes."""


class ExportError(BilevelError):
    """A model that cannot be exported as it is."""


class BundleError(BilevelError):
    """A bundle that is damaged or of another format."""


class EngineError(BilevelError):
    """An engine that is damaged, or does not run here."""


class DeployError(BilevelError):
    """A folder for a device that cannot be written."""


class KernelError(BilevelError):
    """A kernel library cannot be built or used, or refuses a call."""


class RequestError(BilevelError):
    """A prompt or a sampling setting that cannot be served."""


class ContextTooLong(RequestError):
    """A prompt, with the tokens that are asked for behind it, is longer than the model, its engine or the server allows."""


class Overloaded(BilevelError):
    """A server's queue is full; ``retry_after`` is a guess, in seconds, of when there is room."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ShuttingDown(BilevelError):
    """A server that takes no more requests."""


class DeadEnd(BilevelError):
    """A text has come to a place where its grammar allows no token of the vocabulary."""


class MissingDependency(BilevelError):
    """An optional package is not installed."""


def short(value: object, most: int = 80) -> str:
    """A value as Python writes it, for a sentence: ``most`` characters of it."""
    try:
        text = repr(value)
    except RecursionError:
        return "something nested too deep"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def harmless(text: str) -> str:
    """Text from a file for a terminal: what would move its cursor, colour it or turn its direction is written as an escape."""
    return "".join(
        character if character in "\n\t" or unicodedata.category(character) not in _UNSEEN else repr(character)[1:-1]
        for character in text
    )


def require(name: str) -> ModuleType:
    """Import an optional package, or say which extra brings it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # installed but broken: show its own failure
        extra = _EXTRAS.get(name.split(".")[0], "dev")
        raise MissingDependency(f"{name} is not installed: pip install 'bilevel[{extra}]'") from None
