"""Llama 2 and 3, SmolLM2, and the many models that are trained in Llama's shape (MiniCPM5 too)."""

from bilevel.families.shared.family import Family

FAMILY = Family(model_types=("llama",))
