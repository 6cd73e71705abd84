"""Changes of a checkpoint and of the bundle made from it alike: another model, without another export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.doubles.bundle import edit_manifest
from tests.export.check.faults import EXPERT_ROUTE, projection
from tests.export.check.surgery import Name, all_of, change_weight, edit_model, read, set_attribute
from tests.support.tiny_models import edit_config


def change_both(
    checkpoint: Path,
    bundle: Path,
    key: str,
    name: Name,
    change: Callable[[torch.Tensor], Any],
    same: Callable[[np.ndarray], Any],
) -> None:
    """One tensor of the checkpoint by ``change``, its initializer in the graph by ``same``; both work in place."""
    weights = load_file(checkpoint / "model.safetensors")
    change(weights[key])
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    edit_model(bundle, change_weight(name, same), weights=True)


def zero_query(checkpoint: Path, bundle: Path) -> None:
    """Layer 1's queries are zero: all of its scores tie."""

    def zero(values: np.ndarray) -> None:
        values[:, :32] = 0

    change_both(checkpoint, bundle, "model.layers.1.self_attn.q_proj.weight", projection(1), torch.Tensor.zero_, zero)


def biases_below_zero(checkpoint: Path, bundle: Path) -> None:
    """The experts' biased scores are all negative: a group masked by 0 instead of -inf would win."""

    def lower(values: Any) -> None:
        values -= 1

    key = "model.layers.1.mlp.gate.e_score_correction_bias"
    change_both(checkpoint, bundle, key, read(EXPERT_ROUTE, 2), lower, lower)


def two_local_blocks(checkpoint: Path, bundle: Path) -> None:
    """Both levels keep two local blocks."""
    edit_config(checkpoint, routing={"local_blocks": 2})
    edit_manifest(bundle, lambda manifest: manifest["config"]["routing"].update(local_blocks=2))
    routers = [("CoarseRoute", 0), ("FineRoute", 0), ("FineRoute", 1)]
    edit_model(bundle, all_of(*(set_attribute(op_type, index, "local_blocks", 2) for op_type, index in routers)))
