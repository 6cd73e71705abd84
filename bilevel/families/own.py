"""This package's own type: what ``config.json`` is written as when the model is of no released type any more.

Every field of ``ModelConfig`` stands under its own name, and no factor is left to fold.
"""

from bilevel.families.shared.family import Family

FAMILY = Family(model_types=("bilevel",))
