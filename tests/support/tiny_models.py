"""Random models of a few kilobytes for the tests of the exporter, and bundles exported once for all test processes."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx
import torch

from bilevel.checkpoint import save_model
from bilevel.config import Experts, ModelConfig, Routing
from bilevel.model import CausalLM
from tests.doubles.bundle import EOS, VOCAB_SIZE, make_tokenizer

BLOCK_SIZE, PREFILL_CHUNK = 4, 16
PRESETS: dict[str, dict[str, Any]] = {
    "two_level": {
        "routing": Routing(block_size=BLOCK_SIZE, coarse_topk=6, topk=3, window=2, route_dim=6),
        "experts": Experts(
            num_experts=6, top_k=2, intermediate_size=5, layers=(1,), n_group=3, topk_group=2, select_bias=True, scale=1.5
        ),
        "model_type": "qwen3",
    },
    "moba": {"routing": Routing(preset="moba", block_size=BLOCK_SIZE, topk=3, init_blocks=0), "tie_word_embeddings": True},
    "gate": {"routing": Routing(preset="moba_gqa", block_size=BLOCK_SIZE, topk=3, key="gate", dense_layers=(0,))},
    "bounds": {
        "routing": Routing(
            block_size=BLOCK_SIZE,
            coarse_topk=6,
            topk=3,
            key="bounds",
            coarse_local_blocks=2,
            route_dim=6,
            dense_layers=(1,),
            weighted_words=True,
            window=2,
        )
    },
    "dense": {"routing": Routing(preset="dense", block_size=BLOCK_SIZE)},
    # DeepSeek-V4's gates, the first layer's by a table; a floor that is felt.
    "hashed": {
        "routing": Routing(preset="dense", block_size=BLOCK_SIZE),
        "experts": Experts.deepseek_v4(
            layers=(0, 1), hash_layers=(0,), num_experts=6, top_k=2, intermediate_size=5, norm_floor=1.6
        ),
    },
}


def make_model(preset: str) -> CausalLM:
    """A decoder of two layers; weights are large enough for every router to have something to choose by."""
    config = ModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=96,
        bos_token_id=None,
        eos_token_ids=(EOS,),
        **PRESETS[preset],
    )
    torch.manual_seed(0)
    model = CausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    if config.routing.weighted_words:
        torch.nn.init.uniform_(model.model.word_router.word_weight, 0.1, 2.0)
        torch.nn.init.uniform_(model.model.word_router.window_weight, 0.5, 1.0)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.1)
        if name.endswith("tid2eid"):
            buffer.copy_(torch.rand(VOCAB_SIZE, 6).argsort(1)[:, : buffer.shape[1]])
    return model


def save_checkpoint(folder: Path, preset: str = "two_level") -> Path:
    """Write the model and the fake bundle's tokenizer in Hugging Face's format."""
    save_model(make_model(preset), folder, files={"tokenizer.json": make_tokenizer().to_str().encode()})
    return folder


def edit_config(checkpoint: Path, **changes: Any) -> None:
    """Change config.json in place; a section (routing=..., experts=...) is updated or begun."""
    path = checkpoint / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(config), encoding="utf-8")


def _traced_once(save: Callable[..., onnx.ModelProto], folder: Path) -> Callable[..., onnx.ModelProto]:
    """``save(model, path)`` that runs once for each name of a file; later calls are given copies from ``folder``."""

    def copy(model: CausalLM, path: Path, **options: Any) -> onnx.ModelProto:
        data = f"{path.stem}.data"
        if not (folder / data).exists():
            save(model, folder / path.name, **options)
        for name in (path.name, data):
            shutil.copy(folder / name, path.with_name(name))
        return onnx.load(path, load_external_data=False)

    return copy


def export_once(
    folder: Path, preset: str, weights: str = "fp32", precision: str = "fp32", caches: str = "fp32"
) -> tuple[Path, Path]:
    """(checkpoint, bundle) below ``folder``, which test processes share; the first one that asks makes them.

    Bundles that differ in the format of their weights only are traced once: that format comes after the trace.
    """
    from bilevel.export.decoder import bundle as exporter

    name = "bundle" if weights == precision == "fp32" else weights if precision == "fp32" else precision
    name += "" if caches == "fp32" else f"-kv.{caches}"
    checkpoint, bundle = folder / preset / "checkpoint", folder / preset / name
    bundle.parent.mkdir(parents=True, exist_ok=True)
    with (folder / f"{preset}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not bundle.exists():
            if not checkpoint.exists():
                save_checkpoint(checkpoint, preset)
            traces = folder / preset / f"traces-{precision}-{caches}"
            traces.mkdir(exist_ok=True)
            saves = {name: _traced_once(getattr(exporter, name), traces) for name in ("save_decoder", "save_dense_twin")}
            with patch.multiple(exporter, **saves):
                formats = {"weights": weights, "precision": precision, "caches": caches}
                exporter.export_bundle(checkpoint, bundle, prefill_chunk=PREFILL_CHUNK, **formats)
    return checkpoint, bundle
