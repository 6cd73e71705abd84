"""Which tokens end a text, and who says so: models name them in several files, and seldom all of them in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bilevel.bundle.chat import read_sources, turn_end
from bilevel.config import ModelConfig
from bilevel.errors import BundleError, ExportError
from bilevel.folders import read_json

TEMPLATE = "the chat template's end of a turn"


def end_tokens(checkpoint: Path, config: ModelConfig) -> dict[int, list[str]]:
    """Ids that end a text -> the sources that name them, in the order of ``config.json``, the others behind.

    Sources: config.json, generation_config.json, the ``eos_token`` of the tokenizer's files, and the special token that the
    chat template writes behind an answer. Raises ExportError for a file that cannot be read, or an id outside the vocabulary.
    """
    ends: dict[int, list[str]] = {}
    for source, tokens in _named(checkpoint, config):
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < config.vocab_size:
                raise ExportError(
                    f"{source} of {checkpoint} names the end token {token!r}; the model's tokens are 0 to "
                    f"{config.vocab_size - 1}: mend it"
                )
            ends.setdefault(token, []).append(source)
    return ends


def _named(checkpoint: Path, config: ModelConfig) -> list[tuple[str, list[Any]]]:
    """(source, ids), in order."""
    listed = _read(checkpoint / "generation_config.json").get("eos_token_id")
    try:
        special, ids = _vocabulary(_read(checkpoint / "tokenizer.json"))
    except (AttributeError, IndexError, KeyError, TypeError):
        raise ExportError(f"{checkpoint / 'tokenizer.json'} is no tokenizer's; write it anew with transformers") from None
    named: list[tuple[str, list[Any]]] = [
        ("config.json", list(config.eos_token_ids)),
        ("generation_config.json", listed if isinstance(listed, list) else [] if listed is None else [listed]),
    ]
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _read(checkpoint / file).get("eos_token")
        text = token.get("content") if isinstance(token, dict) else token
        # Tokenizers may know more tokens than the model has rows for; such a one is never generated.
        if isinstance(text, str) and ids.get(text, config.vocab_size) < config.vocab_size:
            named.append((f"{file}'s eos_token", [ids[text]]))
    try:
        end = turn_end(read_sources(checkpoint), special)
    except BundleError as error:
        raise ExportError(str(error)) from None
    if end is not None and ids[end] < config.vocab_size:
        named.append((TEMPLATE, [ids[end]]))
    return named


def _vocabulary(tokenizer: dict[str, Any]) -> tuple[list[str], dict[str, int]]:
    """Texts of the special tokens, and the ids of all added tokens and words."""
    model = tokenizer.get("model")
    words = model.get("vocab", {}) if isinstance(model, dict) else {}
    if isinstance(words, list):  # unigram: [word, score] by id
        words = {each[0]: index for index, each in enumerate(words)}
    added = [each for each in tokenizer.get("added_tokens") or [] if isinstance(each, dict)]
    return [each["content"] for each in added if each.get("special")], {
        **words,
        **{each["content"]: each["id"] for each in added},
    }


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file."""
    try:
        values = read_json(path) if path.is_file() else {}
    except ValueError as error:
        raise ExportError(f"{path} {error}; write it anew or delete it") from None
    if not isinstance(values, dict):
        raise ExportError(f"{path} is no JSON object; write it anew or delete it")
    return values
