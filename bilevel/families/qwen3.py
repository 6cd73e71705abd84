"""Qwen3: every head's queries and keys are normalised."""

from bilevel.families.shared.family import Family

FAMILY = Family(model_types=("qwen3",), windows="switch")
