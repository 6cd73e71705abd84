"""What is new in the families' models, exported: both CPU executions, parity part by part, the dense twin, int4, fp16."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bilevel.bundle.format import load_bundle
from bilevel.checkpoint import load_model
from bilevel.export.check.parity import check_bundle
from bilevel.export.decoder.bundle import export_bundle
from bilevel.export.decoder.dense_twin import dense_twin
from bilevel.model import CausalLM
from bilevel.runtime.backend.onnx import OnnxSession
from bilevel.runtime.cli.main import main
from tests.bilevel.families.definitions import save_bailing
from tests.bilevel.families.released import change_config, make
from tests.doubles.bundle import EOS, make_tokenizer

TOKENS = 60
ROUTINGS: dict[str, dict[str, Any]] = {
    "two_level": {"preset": "two_level", "block_size": 4, "coarse_topk": 6, "topk": 3},
    "moba_gqa": {"preset": "moba_gqa", "block_size": 4, "topk": 3, "init_blocks": 0},
}


def release(folder: Path, name: str, routing: str, **changes: Any) -> Path:
    """A released folder with a tokenizer and a routing section."""
    if name == "bailing_moe":
        save_bailing(folder)
    else:
        make(name).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(make_tokenizer().to_str().encode())
    change_config(folder, routing=ROUTINGS[routing], eos_token_id=EOS, **changes)
    return folder


@pytest.mark.parametrize(
    "name, routing, options, changes",
    [
        # Bias on q, k and v alone, a layer without positions, YaRN's amplitude, heads that the twin's operator turns itself.
        (
            "qwen2",
            "two_level",
            {"ignore_keys": ["attention_temperature_note"]},
            {
                "attention_temperature_note": 0.7,
                "head_dim": 8,
                "nope_layers": [1],
                "rope_parameters": {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "attention_factor": 1.2},
                "original_max_position_embeddings": 32,
            },
        ),
        # q and k normalised over all heads, softmax gate that is not renormalised; 16 bits.
        ("olmoe", "moba_gqa", {"precision": "fp16"}, {}),
        # A dense layer before an expert layer, groups, bias of the choice, shared experts, partial rotary, biases; small
        # weights.
        pytest.param("glm4_moe", "two_level", {"weights": "int4"}, {}, marks=pytest.mark.thorough),
        # Routed in both levels as released: q, k and v stored in one tensor, experts one by one, MoBA over key/value heads.
        ("bailing_moe", "moba_gqa", {}, {}),
    ],
    ids=["biases-nope-yarn", "whole-norm-fp16", "shared-groups-partial-int4", "ring"],
)
def test_family_exports(name: str, routing: str, options: dict[str, Any], changes: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = release(tmp_path / "released", name, routing, **changes)
    export_bundle(checkpoint, tmp_path / "bundle", prefill_chunk=16, **options)
    report = check_bundle(tmp_path / "bundle", checkpoint, tokens=TOKENS)
    assert report.passed, report
    assert list(load_bundle(tmp_path / "bundle").ignored_keys) == options.get("ignore_keys", [])
    if not options.keys() & {"weights", "precision"}:
        twin = dense_twin(load_model(checkpoint, ignore=options.get("ignore_keys", ())))
        twin_equals_pytorch(twin, tmp_path / "bundle")


def twin_equals_pytorch(twin: CausalLM, folder: Path) -> None:
    """A chunk, one behind cached tokens, one that is padded, single tokens."""
    bundle = load_bundle(folder).dense_twin()
    caches = OnnxSession(bundle).allocate(1, 64)
    ids = torch.randint(0, bundle.vocab_size, (1, 30))
    with torch.no_grad():
        expected = twin(ids)[0].numpy()
    past = 0
    for valid, padding in ((7, 0), (9, 0), (12, 3), (1, 0), (1, 0)):
        call = np.zeros((1, valid + padding), np.int64)
        call[0, :valid] = ids[0, past : past + valid]
        logits = caches.run(call, np.array([past], np.int32), np.array([valid], np.int32))
        past += valid
        np.testing.assert_allclose(logits[0], expected[past - 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "unknown key 'flavour' .5., which may change the result; if it does not, export with --ignore-key flavour"),
        (["--ignore-key", "flavour", "--ignore-key", "taste"], "--ignore-key taste: .*config.json has no such key"),
        (["--ignore-key", "flavour", "--ignore-key", "_note"], "--ignore-key _note: .* needs none to be ignored"),
        (["--ignore-key", "vocab_size"], "--ignore-key vocab_size: the result depends on this key"),
    ],
    ids=["refused", "absent", "inert", "read"],
)
def test_ignore_key(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = release(tmp_path / "released", "qwen2", "moba_gqa", flavour=5, _note=3)
    assert main(["export", str(checkpoint), str(tmp_path / "bundle"), *options]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "bundle").exists()
