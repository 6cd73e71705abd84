"""A text some of whose special tokens are tokens and others just text: a chat whose contents spell out tokens' names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

# Unicode's noncharacters, which no text is to hold (The Unicode Standard, section 23.7).
MARK, *SEAMS = (chr(code) for code in range(0xFDD0, 0xFDF0))


class LiteralEncoder:
    """A tokenizer's twin whose added tokens have a mark before their names, so that plain names are text.

    source: the contents of tokenizer.json. tokenizers: the library.
    """

    def __init__(self, tokenizers: Any, source: str, mark: str) -> None:
        settings = json.loads(source)
        added = settings["added_tokens"]
        names = sorted((re.escape(each["content"]) for each in added), key=len, reverse=True)
        self._names = re.compile("|".join(names)) if names else None
        self._special = {each["id"] for each in added if each["special"]}
        self._mark = mark
        contents = {each["id"]: each["content"] for each in added}
        for each in added:
            each["content"] = mark + each["content"]
        settings |= {"post_processor": None, "truncation": None, "padding": None}
        self._twin: Any = tokenizers.Tokenizer.from_str(json.dumps(settings, ensure_ascii=False))
        self._ids = {self._twin.token_to_id(mark + content): token for token, content in contents.items()}

    def encode(self, text: str, seam: str) -> list[int] | None:
        """Ids of ``text`` without its seams: names that one breaks are text, all others are tokens.

        None where the vocabulary holds such a name as an ordinary piece, so that it became a token nevertheless.
        """
        if self._names is not None:
            text = self._names.sub(lambda match: self._mark + match[0], text)
        ids = self._twin.encode(text.replace(seam, ""), add_special_tokens=False).ids
        if any(token in self._special and token not in self._ids for token in ids):
            return None
        return [self._ids.get(token, token) for token in ids]


def encode_apart(encode: Any, parts: Iterable[str]) -> list[int]:
    """The parts' ids one behind another; a name that was cut between two of them is no token."""
    return [token for part in parts if part for token in encode(part, add_special_tokens=False)]
