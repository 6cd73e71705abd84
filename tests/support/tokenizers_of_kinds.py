"""Small tokenizers of every kind, trained here: the ways in which tokens become text."""

from __future__ import annotations

import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = ["def add(a, b):\n    return a + b\n", "the quick brown fox, the lazy dog. Don't!", "für 你好 und 🦊🦊 naïve"] * 3
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_end|>"]


def _train(tokenizer: Tokenizer, trainer: trainers.Trainer) -> Tokenizer:
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("<tool call>", special=False)])
    return tokenizer


def byte_level_bpe() -> Tokenizer:
    """GPT-2, Llama 3, Qwen, SmolLM."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _train(
        tokenizer,
        trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )


def _fallback(strip: int, normalizer: normalizers.Normalizer) -> Tokenizer:
    tokens = [
        *SPECIAL,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
        "▁t",
        "▁th",
        "▁the",
        "ü",
    ]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizer
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", strip, 0)] if strip else [])])
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


def byte_fallback_bpe() -> Tokenizer:
    """Llama 2, TinyLlama, Mistral: a space before the text, which decoding takes off again."""
    return _fallback(1, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]))


def byte_fallback_bpe_without_prefix() -> Tokenizer:
    """Gemma."""
    return _fallback(0, normalizers.Replace(" ", "▁"))


def unigram() -> Tokenizer:
    """T5, XLM-R."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _train(
        tokenizer, trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="<pad>", show_progress=False)
    )


def word_piece() -> Tokenizer:
    """BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _train(tokenizer, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False))


def words() -> Tokenizer:
    """Whole words and no decoder."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _train(tokenizer, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))


def end_of_word_bpe() -> Tokenizer:
    """CLIP, XLM: the decoder looks at which token is the last."""
    tokenizer = Tokenizer(models.BPE(unk_token="<pad>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False)
    return _train(tokenizer, trainer)


KINDS = (
    byte_level_bpe,
    byte_fallback_bpe,
    byte_fallback_bpe_without_prefix,
    unigram,
    word_piece,
    words,
    end_of_word_bpe,
)


def saved(tokenizer: Tokenizer, folder: object) -> tokenizers.Tokenizer:
    """The tokenizer as a file in ``folder``, read again."""
    path = f"{folder}/tokenizer.json"
    tokenizer.save(path)
    return tokenizers.Tokenizer.from_file(path)
