"""SmolLM3: Llama without positions in every fourth layer, or in those that no_rope_layers gives a 0."""

from typing import Any

from bilevel.errors import ConfigError
from bilevel.families.shared.family import Family, Raw, whole, whole_list


def _values(raw: Raw) -> dict[str, Any]:
    layers, interval = whole(raw, "num_hidden_layers", 0), whole(raw, "no_rope_layer_interval", 4)
    has_positions = whole_list(raw, "no_rope_layers")
    if not has_positions:
        has_positions = [int((i + 1) % interval != 0) if interval else 1 for i in range(layers)]
    if len(has_positions) < layers:
        raise ConfigError(
            f"config.json's no_rope_layers holds {len(has_positions)} entries for {layers} layers; give one a layer"
        )
    return {"nope_layers": tuple(i for i in range(layers) if not has_positions[i])}


FAMILY = Family(
    model_types=("smollm3",),
    reads=frozenset({"no_rope_layers", "no_rope_layer_interval", "nope_layers"}),
    values=_values,
    windows="switch",
    defaults={"rope_theta": 2e6, "max_position_embeddings": 32768, "tie_word_embeddings": True},
)
