"""Sliding windows: attention over the last tokens only is not implemented, but many files name a window that has no effect."""

from __future__ import annotations

from typing import Any

from bilevel.errors import ConfigError
from bilevel.families.shared.family import flag, whole

KEYS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
_KINDS = ("full_attention", "sliding_attention")


def read_windows(raw: dict[str, Any], windows: str) -> None:
    """Take the keys of windows out of ``raw``. Raises ConfigError where a layer would see less than every earlier token.

    windows: see ``Family``. A window as long as the longest text has no effect either.
    """
    switch, window = raw.pop("use_sliding_window", None), raw.pop("sliding_window", None)
    first, kinds = raw.pop("max_window_layers", None), raw.pop("layer_types", None) or []
    if not isinstance(kinds, list) or any(kind not in _KINDS for kind in kinds):
        raise ConfigError(
            f"config.json's layer_types names layers other than {' and '.join(_KINDS)}, which are not implemented"
        )
    switched_on = flag({"use_sliding_window": switch}, "use_sliding_window", windows == "always")
    if kinds:
        slides = "sliding_attention" in kinds
    else:
        slides = switched_on and not _from_no_layer_on(first, raw)
    length = whole(raw, "max_position_embeddings", 2048)
    size = whole({"sliding_window": window}, "sliding_window", 0)
    if not slides or size >= max(length, 1):
        return
    if size:
        raise ConfigError(
            f"config.json sets sliding_window={size} below max_position_embeddings={length}, and windows are not implemented; "
            f"set max_position_embeddings to {size}, up to which nothing slides out of the window"
        )
    if kinds:
        raise ConfigError(
            "config.json's layer_types names layers other than full_attention, and gives no sliding_window for them"
        )
    if switch:
        raise ConfigError(
            "config.json sets use_sliding_window but no sliding_window; windows are not implemented: set it to false"
        )


def _from_no_layer_on(first: Any, raw: dict[str, Any]) -> bool:
    """Whether max_window_layers, the first layer with a window, lies behind the last layer."""
    if first is None:
        return False
    return whole({"max_window_layers": first}, "max_window_layers", 0) >= whole(raw, "num_hidden_layers", 0)
