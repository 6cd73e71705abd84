"""Files with experts that contradict themselves, or whose gate is another, are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bilevel.errors import CheckpointError
from bilevel.export.gguf.convert import import_gguf
from tests.bilevel.families.released import make
from tests.support.gguf_files import Metadata, write_gguf
from tests.support.gguf_released import converted_metadata, converted_tensors, released_files, tiny_vocabulary

CONFIG, WEIGHTS = released_files(make("glm4_moe"))


def written(folder: Path, changes: Metadata, without: str = "", **tensors: np.ndarray) -> Path:
    """A tiny GLM with other metadata (None: without the key), without the tensors that ``without`` begins, with others."""
    metadata = {**converted_metadata("glm4moe", CONFIG), **tiny_vocabulary(), **changes}
    stored = {
        **converted_tensors("glm4moe", CONFIG, WEIGHTS),
        **{name.replace("__", "."): value for name, value in tensors.items()},
    }
    return write_gguf(
        folder / "m.gguf",
        {key: value for key, value in metadata.items() if value is not None},
        {name: array for name, array in stored.items() if not without or not name.startswith(without)},
    )


def assert_refused(path: Path, expected: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^{path} {expected}"):
        import_gguf(path, path.parent / "checkpoint")
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"glm4moe.expert_count": None}, r"lacks the metadata glm4moe\.expert_count; convert"),
        ({"glm4moe.expert_count": 8.5}, r"gives glm4moe\.expert_count as 8\.5, which is no int"),
        ({"glm4moe.expert_used_count": 9}, r"gives glm4moe\.expert_used_count=9 of expert_count=8; convert"),
        ({"glm4moe.expert_used_count": 5}, r"gives glm4moe\.expert_used_count=5, more than 2 of 4 groups hold; convert"),
        ({"glm4moe.expert_group_count": 3}, r"gives glm4moe\.expert_group_count=3 and expert_group_used_count=2 for 8 experts"),
        ({"glm4moe.expert_group_used_count": 5}, r"gives glm4moe\.expert_group_count=4 and expert_group_used_count=5 for 8"),
        ({"glm4moe.expert_group_count": 8}, r"gives glm4moe\.expert_group_count=8, which leaves groups of one expert"),
        ({"glm4moe.expert_gating_func": 1}, r"gives glm4moe\.expert_gating_func=1, and .* by 2 \(1 softmax, 2 sigmoid\); give"),
        ({"glm4moe.leading_dense_block_count": 3}, r"gives glm4moe\.leading_dense_block_count=3 of 2 layers; convert"),
        ({"glm4moe.leading_dense_block_count": 0}, r"lacks the tensor blk\.0\.ffn_gate_inp\.weight, which its metadata calls"),
        (
            {"glm4moe.expert_feed_forward_length": 32},
            r"stores blk\.1\.ffn_gate_exps\.weight as \[8, 24, 32\], .* \[8, 32, 32\]",
        ),
        ({"glm4moe.expert_shared_count": 1}, r"stores blk\.1\.ffn_gate_shexp\.weight as \[48, 32\], .* call for \[24, 32\]"),
        ({"glm4moe.expert_weights_scale": -1.0}, r"gives glm4moe\.expert_weights_scale=-1\.0, which must be greater than 0"),
        ({"glm4moe.expert_weights_norm": 1}, r"gives glm4moe\.expert_weights_norm as 1, which is no bool"),
        ({"glm4moe.nextn_predict_layers": 3}, r"gives glm4moe\.nextn_predict_layers=3 of 3 blocks"),
        ({"glm4moe.rope.dimension_count": 7}, r"gives glm4moe\.rope\.dimension_count=7 for heads of 16 channels"),
        (
            {"glm4moe.rope.dimension_sections": [4, 4, 4, 0]},
            r"gives glm4moe\.rope\.dimension_sections=\[4, 4, 4, 0\], which is",
        ),
    ],
)
def test_metadata(changes: Metadata, expected: str, tmp_path: Path) -> None:
    assert_refused(written(tmp_path, changes), expected)


@pytest.mark.parametrize(
    "without, expected",
    [
        ("blk.1.ffn_up_exps", r"lacks the tensor blk\.1\.ffn_up_exps\.weight, which its metadata calls for; convert"),
        ("blk.1.exp_probs_b", r"lacks the tensor blk\.1\.exp_probs_b\.bias"),
        ("blk.1.ffn_down_shexp", r"lacks the tensor blk\.1\.ffn_down_shexp\.weight"),
        ("blk.0.attn_q_norm", r"lacks the tensor blk\.0\.attn_q_norm\.weight"),
    ],
)
def test_a_missing_tensor(without: str, expected: str, tmp_path: Path) -> None:
    assert_refused(written(tmp_path, {}, without), expected)


def test_tensors_without_a_place(tmp_path: Path) -> None:
    path = written(tmp_path, {}, blk__1__ffn_gate_inp__bias=np.zeros(8, np.float32))
    assert_refused(path, r"stores blk\.1\.ffn_gate_inp\.bias \(1 such tensors\), for which the architecture has no place")


def test_an_unusable_expert_is_named(tmp_path: Path) -> None:
    weights = converted_tensors("glm4moe", CONFIG, WEIGHTS)["blk.1.ffn_up_exps.weight"].copy()
    weights[7, 3, 5] = np.nan
    path = written(tmp_path, {}, blk__1__ffn_up_exps__weight=weights)
    assert_refused(path, r"holds NaN or infinite weights in blk\.1\.ffn_up_exps\.weight")


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    """GLM's files hold them behind the last layer; no text passes through them."""
    further = {f"blk__2__nextn__{name}__weight": np.ones(32, np.float32) for name in ("enorm", "hnorm")}
    path = written(tmp_path, {"glm4moe.block_count": 3, "glm4moe.nextn_predict_layers": 1}, **further)
    report = import_gguf(path, tmp_path / "checkpoint")
    assert report.config["num_hidden_layers"] == 2 and report.num_weights == sum(array.size for array in WEIGHTS.values())
    assert json.loads((tmp_path / "checkpoint" / "config.json").read_text())["num_hidden_layers"] == 2


@pytest.mark.parametrize(
    "name, arch, changes, expected",
    [
        ("olmoe", "olmoe", {"attention.clamp_kqv": 8.0}, r"gives olmoe\.attention\.clamp_kqv=8\.0, which is not imported"),
        ("olmoe", "olmoe", {"expert_gating_func": 2}, r"gives olmoe\.expert_gating_func=2, and .* are chosen by 1"),
        ("dots1", "dots1", {"expert_gating_func": None}, r"gives dots1\.expert_gating_func=0, and .* are chosen by 2"),
        (
            "granitemoe",
            "granitemoe",
            {"rope.scaling.finetuned": False},
            r"gives granitemoe\.rope\.scaling\.finetuned=False, by which Granite has no positions",
        ),
        (
            "granitemoe",
            "granitemoe",
            {"expert_shared_feed_forward_length": 64},
            r"gives granitemoe\.expert_shared_feed_forward_length=64, which is not imported and may change the result",
        ),
        (
            "phi3",
            "phi3",
            {"attention.sliding_window": 64},
            r"gives phi3\.attention\.sliding_window=64 below its context length 256, .*; set phi3\.context_length to 64",
        ),
    ],
)
def test_other_families(name: str, arch: str, changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    config, weights = released_files(make(name))
    metadata = {**converted_metadata(arch, config), **tiny_vocabulary(), **{f"{arch}.{key}": changes[key] for key in changes}}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    assert_refused(write_gguf(tmp_path / "m.gguf", metadata, converted_tensors(arch, config, weights)), expected)
