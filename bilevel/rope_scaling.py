"""Rotary frequencies other than the plain ones, as a configuration names them; ``bilevel/rotary.py`` computes them.

What transformers computes for the same names is the definition (``modeling_rope_utils``): an exported graph holds one table of
frequencies, so a kind whose frequencies change with the length of the text can be had for a declared length only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bilevel.config_types import check_types, positive
from bilevel.errors import ConfigError

ROPE_TYPES = ("linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """One kind of scaled positions; a field that a kind does not use is None or its default.

    linear: every frequency divided by factor. llama3: Llama 3.1's blend between low_freq_factor and high_freq_factor.
    yarn (arXiv 2309.00071): a ramp between the channels that turn beta_fast and beta_slow times in
    original_max_position_embeddings, its ends whole channels with truncate; cos and sin times attention_factor, which follows
    from factor, or from mscale and mscale_all_dim, where it is not given.
    longrope (arXiv 2402.13753): every frequency divided by its own factor, those of long_factor where the declared capacity
    (max_position_embeddings) exceeds original_max_position_embeddings, else those of short_factor.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ConfigError(
                f"rope_type={self.rope_type!r} is not supported; only default, {', '.join(ROPE_TYPES)} and, within "
                "max_position_embeddings, dynamic positions are implemented"
            )
        for name in ("short_factor", "long_factor"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_types("rope_scaling", self)
        if not self.factor > 0:
            raise ConfigError(f"rope_scaling.factor={self.factor!r} must be greater than 0")
        positive("rope_scaling", original_max_position_embeddings=self.original_max_position_embeddings)
        if not self.high_freq_factor > self.low_freq_factor:
            raise ConfigError(
                f"rope_scaling.high_freq_factor={self.high_freq_factor!r} must exceed low_freq_factor={self.low_freq_factor!r}"
            )
        for name in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"rope_scaling.{name}={value!r} must be greater than 0")
        if self.rope_type == "longrope":
            self._check_factors()

    def _check_factors(self) -> None:
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if factors is None:
                raise ConfigError(f"rope_scaling.{name} is missing, which rope_type longrope needs")
            if not all(factor > 0 for factor in factors):
                raise ConfigError(f"rope_scaling.{name} holds {min(factors)!r}, but every factor must be greater than 0")
        if self.original_max_position_embeddings < 2:
            raise ConfigError("rope_scaling.original_max_position_embeddings=1 is too small for rope_type longrope")

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied with; 1 for linear and llama3."""
        if self.rope_type not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return float(self.attention_factor)
        if self.factor <= 1:
            return 1.0
        if self.rope_type == "longrope":
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))
        upper, lower = (self.mscale, self.mscale_all_dim) if self.mscale and self.mscale_all_dim else (1.0, None)
        growth = 0.1 * math.log(self.factor)
        return (growth * upper + 1) / (1.0 if lower is None else growth * lower + 1)
