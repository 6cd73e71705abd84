"""Scaled positions in metadata: what each key becomes, and what is refused because its meaning is not exact."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bilevel.errors import CheckpointError
from bilevel.export.gguf.header import GgufFile, read_gguf
from bilevel.export.gguf.rope import rope_scaling
from tests.support.gguf_files import write_gguf

CONFIG = {"max_position_embeddings": 256, "head_dim": 8, "rotated_channels": 8, "rope_theta": 10000.0}
YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 64}
FACTORS = {f"rope_factors_{kind}.weight": np.array([1, 2, 4, 8.5], np.float32) for kind in ("long", "short")}


def read(folder: Path, keys: dict[str, Any], tensors: dict[str, np.ndarray] | None = None, factors: str = "longrope") -> Any:
    metadata = {f"x.rope.{key}" if key == "scale_linear" else f"x.rope.scaling.{key}": value for key, value in keys.items()}
    file: GgufFile = read_gguf(write_gguf(folder / "m.gguf", metadata, tensors or {"t": np.zeros(1, np.float32)}))
    return rope_scaling(file, "x", CONFIG, factors)


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({}, {}),
        ({"type": "none", "factor": 8.0}, {}),
        ({"type": "linear", "factor": 1.0}, {}),
        ({"attn_factor": 1.0, "original_context_length": 64}, {}),
        ({"type": "linear", "factor": 2.5}, {"rope_type": "linear", "factor": 2.5}),
        # To llama.cpp a factor without a kind is linear, under either name.
        ({"factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"scale_linear": 3.0}, {"rope_type": "linear", "factor": 3.0}),
        ({"type": "linear", "scale_linear": 3.0}, {"rope_type": "linear", "factor": 3.0}),
        (YARN, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
        ({"type": "yarn", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}),
        (
            {**YARN, "yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0, "yarn_beta_fast": 32.0, "yarn_beta_slow": 2.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_slow": 2.0},
        ),
        (
            {**YARN, "yarn_attn_factor": 0.1 * math.log(4) + 1},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        (
            {**YARN, "attn_factor": 1.5},
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "attention_factor": 1.5 * (0.1 * math.log(4) + 1),
            },
        ),
    ],
)
def test_what_metadata_become(keys: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    assert read(tmp_path, keys).get("rope_scaling", {}) == expected


@pytest.mark.parametrize("keys, factors", [({"type": "longrope"}, "longrope"), ({}, "always")])
def test_longrope(keys: dict[str, Any], factors: str, tmp_path: Path) -> None:
    lists = {"rope_type": "longrope", "short_factor": [1.0, 2.0, 4.0, 8.5], "long_factor": [1.0, 2.0, 4.0, 8.5]}
    trained = {**keys, "original_context_length": 64, "attn_factor": math.sqrt(1 + math.log(4) / math.log(64))}
    expected = {"rope_scaling": lists, "original_max_position_embeddings": 64}
    assert read(tmp_path, trained, FACTORS, factors) == expected
    trained["attn_factor"] = 1.25
    assert read(tmp_path, trained, FACTORS, factors)["rope_scaling"] == {**lists, "attention_factor": 1.25}


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({"type": "dynamic"}, r"gives x\.rope\.scaling\.type='dynamic', and none, linear, yarn, longrope are imported; give"),
        ({"type": "linear"}, r"lacks the metadata x\.rope\.scaling\.factor"),
        ({"type": "yarn"}, r"lacks the metadata x\.rope\.scaling\.factor"),
        ({"type": "yarn", "factor": "4"}, r"gives x\.rope\.scaling\.factor as '4', which is no float"),
        ({"type": "linear", "factor": -2.0}, r"gives x\.rope\.scaling\.factor=-2\.0, which must be greater than 0"),
        ({**YARN, "original_context_length": 1}, r"original_context_length=1, which must be at least 2"),
        ({**YARN, "yarn_ext_factor": 0.5}, r"yarn_ext_factor=0\.5, which mixes frequencies as transformers does not; give"),
        (
            {**YARN, "yarn_attn_factor": 1.0},
            r"yarn_attn_factor=1\.0, which is not 1\.13863, and llama\.cpp does not say whether",
        ),
        (
            {**YARN, "yarn_log_multiplier": 0.1},
            r"yarn_log_multiplier=0\.1, which llama\.cpp reads for other architectures only",
        ),
        ({"type": "linear", "factor": 2.0, "attn_factor": 1.5}, r"attn_factor=1\.5 for positions of the kind linear, which"),
        ({"yarn_beta_fast": 16.0}, r"yarn_beta_fast=16\.0, and its positions are of the kind 'none', not 'yarn'"),
    ],
)
def test_metadata_that_are_not_exact(keys: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"m\.gguf .*{expected}"):
        read(tmp_path, keys)


@pytest.mark.parametrize(
    "keys, tensors, factors, expected",
    [
        ({"type": "longrope"}, {}, "longrope", r"lacks the tensor rope_factors_short\.weight, which its longrope positions"),
        ({"type": "longrope"}, FACTORS, "", r"type='longrope', whose factors llama\.cpp does not apply in x; give"),
        ({}, FACTORS, "longrope", r"stores rope_factors_long\.weight, which positions of the kind 'none' .* have no use for"),
        (YARN, FACTORS, "always", r"stores rope_factors_long\.weight, which positions of the kind 'yarn' .* have no use for"),
        (
            {"type": "linear", "factor": 2.0},
            {"rope_freqs.weight": np.ones(4, np.float32)},
            "longrope",
            r"stores rope_freqs\.weight, which positions of the kind 'linear'",
        ),
        ({"type": "longrope", "factor": 2.0}, FACTORS, "longrope", r"factor=2\.0 beside tables of factors, which transformers"),
        (
            {"type": "longrope"},
            {**FACTORS, "rope_factors_long.weight": np.ones(3, np.float32)},
            "longrope",
            r"stores in rope_factors_long\.weight 3 factors from 1\.0, and its metadata call for 4 greater than 0",
        ),
        (
            {"type": "longrope"},
            {**FACTORS, "rope_factors_short.weight": np.array([1, 0, 1, 1], np.float32)},
            "longrope",
            r"stores in rope_factors_short\.weight 4 factors from 0\.0, and its metadata call for 4 greater than 0",
        ),
    ],
)
def test_tables_that_do_not_fit(
    keys: dict[str, Any], tensors: dict[str, np.ndarray], factors: str, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=rf"m\.gguf .*{expected}"):
        read(tmp_path, keys, tensors or None, factors)
