"""The tokenizer in a GGUF file's metadata -> ``tokenizer.json`` and ``tokenizer_config.json``.

Ids are those of llama.cpp. Where it and the models' own files differ (Qwen's normalise to NFC, llama.cpp does not), llama.cpp
is followed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from bilevel.errors import CheckpointError
from bilevel.export.gguf.header import CONVERT, GgufFile
from bilevel.export.gguf.pretokenizers import PRE_TOKENIZERS

# llama.cpp's kinds of tokens that are matched in the text before anything else.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece spells a space
_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Texts that end an answer wherever they are a control token of the vocabulary: llama.cpp stops at them whatever the metadata
# say.
_END_TEXTS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")


class GgufVocabulary:
    """What a file says of its tokenizer. tokens, types: by id. Raises CheckpointError for what is missing or contradicts
    itself."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.kind: str = file.value("tokenizer.ggml.model", str)
        if self.kind not in _BUILDERS:
            raise CheckpointError(
                f"{file.path} holds a tokenizer of the kind {self.kind!r} (tokenizer.ggml.model), and "
                f"{', '.join(_BUILDERS)} are imported; give the model's own folder in Hugging Face's format"
            )
        self.tokens: list[str] = file.value("tokenizer.ggml.tokens", list)
        self.types: list[int] = file.value("tokenizer.ggml.token_type", list, [1] * len(self.tokens))
        if len(self.types) != len(self.tokens):
            raise CheckpointError(f"{file.path} gives {len(self.tokens)} tokens and {len(self.types)} token types; {CONVERT}")
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(token for index, token in enumerate(self.tokens) if self.ids[token] != index)
            raise CheckpointError(f"{file.path} lists the token {twice!r} twice in tokenizer.ggml.tokens; {CONVERT}")

    def index(self, key: str) -> int | None:
        """The id of a special token, None where the file names none."""
        number: int = self.file.value(f"tokenizer.ggml.{key}", int, -1)
        if number >= len(self.tokens):
            raise CheckpointError(
                f"{self.file.path} gives tokenizer.ggml.{key}={number}, and has {len(self.tokens)} tokens; {CONVERT}"
            )
        return None if number < 0 else number

    def end_ids(self) -> list[int]:
        """Ids that end an answer: the file's end of text first, then those of turns and messages."""
        named = [index for key in _ENDS if (index := self.index(key)) is not None]
        controls = [self.ids[text] for text in _END_TEXTS if text in self.ids and self.types[self.ids[text]] == _CONTROL]
        return list(dict.fromkeys([*named, *controls]))

    def added_tokens(self) -> list[AddedToken]:
        """Tokens that are matched whole in the text; those with a role are special, as control tokens are."""
        roles = {index for key in (*_ROLES.values(), *_ENDS) if (index := self.index(key)) is not None}
        special = {index for index, kind in enumerate(self.types) if kind in (_UNKNOWN, _CONTROL)} | roles
        return [
            AddedToken(self.tokens[index], normalized=False, special=index in special)
            for index, kind in enumerate(self.types)
            if kind == _USER_DEFINED or index in special
        ]

    def merges(self) -> list[tuple[str, str]]:
        """The file's merges, each the two parts of a token."""
        pairs = []
        for number, merge in enumerate(self.file.value("tokenizer.ggml.merges", list)):
            left, _, right = merge.partition(" ")
            if not {left, right, left + right} <= self.ids.keys():
                raise CheckpointError(
                    f"{self.file.path} lists in tokenizer.ggml.merges {merge!r} (number {number}), which does not "
                    f"join two tokens to a third; {CONVERT}"
                )
            pairs.append((left, right))
        return pairs


def make_tokenizer(file: GgufFile) -> tuple[Tokenizer, dict[str, Any], list[int]]:
    """The tokenizer, the contents of ``tokenizer_config.json`` and the ids that end an answer. Raises CheckpointError."""
    vocabulary = GgufVocabulary(file)
    tokenizer, begins = _BUILDERS[vocabulary.kind](vocabulary)
    tokenizer.add_tokens(vocabulary.added_tokens())
    texts = {role: vocabulary.tokens[index] for role, key in _ROLES.items() if (index := vocabulary.index(key)) is not None}
    begins = file.value("tokenizer.ggml.add_bos_token", bool, begins)
    ends = file.value("tokenizer.ggml.add_eos_token", bool, False)
    for role, wanted in (("bos_token", begins), ("eos_token", ends)):
        if wanted and role not in texts:
            raise CheckpointError(
                f"{file.path} adds a {role} to every text, but lacks tokenizer.ggml.{_ROLES[role]}; {CONVERT}"
            )
    if begins or ends:
        around = ([texts["bos_token"]] if begins else []), ([texts["eos_token"]] if ends else [])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*around[0], "$A", *around[1]],
            pair=[
                *around[0],
                "$A",
                *around[1],
                *(f"{text}:1" for text in around[0]),
                "$B:1",
                *(f"{text}:1" for text in around[1]),
            ],
            special_tokens=[(text, vocabulary.ids[text]) for text in dict.fromkeys([*around[0], *around[1]])],
        )
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **texts,
        "add_bos_token": begins,
        "add_eos_token": ends,
        "clean_up_tokenization_spaces": False,
    }
    if template := _chat_template(file):
        config["chat_template"] = template
    return tokenizer, config, vocabulary.end_ids()


def _chat_template(file: GgufFile) -> str | list[dict[str, str]] | None:
    """The template, or several by name as Hugging Face lists them."""
    prefix = "tokenizer.chat_template"
    templates = {"default": file.value(prefix, str, "")}
    templates |= {key.removeprefix(f"{prefix}."): file.value(key, str) for key in file.metadata if key.startswith(f"{prefix}.")}
    if len(templates) == 1:
        return templates["default"] or None
    return [{"name": name, "template": text} for name, text in templates.items() if text]


def _byte_level(vocabulary: GgufVocabulary) -> tuple[Tokenizer, bool]:
    """Byte-level BPE, cut by the rule that ``tokenizer.ggml.pre`` names."""
    file = vocabulary.file
    name = file.value("tokenizer.ggml.pre", str)
    if name not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{file.path} cuts text by the rule {name!r} (tokenizer.ggml.pre), and {', '.join(PRE_TOKENIZERS)} are imported; "
            "give the model's own folder in Hugging Face's format"
        )
    rule = PRE_TOKENIZERS[name]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary.ids, merges=vocabulary.merges(), ignore_merges=rule.whole_words))
    splits: Sequence[Any] = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in rule.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rule.begins


def _sentencepiece(vocabulary: GgufVocabulary) -> tuple[Tokenizer, bool]:
    """SentencePiece's BPE: the token of the highest score is joined first; what no token spells becomes bytes."""
    file = vocabulary.file
    scores = file.value("tokenizer.ggml.scores", list)
    if len(scores) != len(vocabulary.tokens):
        raise CheckpointError(f"{file.path} gives {len(vocabulary.tokens)} tokens and {len(scores)} scores; {CONVERT}")
    unknown = vocabulary.index("unknown_token_id")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=_merges_by_score(vocabulary.ids, scores),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = file.value("tokenizer.ggml.add_space_prefix", bool, True)
    prepend = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return tokenizer, True


def _merges_by_score(ids: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to put a token together from two, the highest-scored token first (of one token, the shorter first part
    first)."""
    merges = [
        (-score, cut, len(token) - cut, token)
        for (token, score) in zip(ids, scores, strict=True)
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    merges.sort(key=lambda merge: merge[:3])  # equal ones stay in the order of the vocabulary
    return [(token[:cut], token[cut:]) for _, cut, _, token in merges]


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}
