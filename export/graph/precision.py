"""The float types that a bundle may have. Imports nothing heavy: the command line checks its options with it."""

from __future__ import annotations

from bilevel.bundle.cache_rows import FORMATS
from bilevel.errors import ExportError

# What the command line calls it -> what bundle.json, NumPy (ml_dtypes) and PyTorch call it.
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# ONNX Runtime's fused attention has CPU kernels for these; a bundle of another type has no dense twin.
TWIN_PRECISIONS = ("fp32", "fp16")


def stored_caches(kv: str | None, precision: str) -> str:
    """What ``bundle.json`` calls the caches that --kv asks for: a packed format, or "fp32" for floats of the model's own type.

    Raises ExportError.
    """
    if kv in PRECISIONS and kv != precision:
        raise ExportError(
            f"--kv {kv} differs from --precision {precision}, and caches of floats have the type of the model; give "
            f"--precision {kv}, or pack them with --kv int8"
        )
    return "fp32" if kv is None or kv in PRECISIONS else kv


def check_precision(precision: str, weights: str, caches: str = "fp32") -> None:
    """Raise ExportError for a precision or format of caches that there is not, or that does not go with the others.

    caches: as ``bundle.json`` calls it, where "fp32" are floats of any precision.
    """
    if caches not in FORMATS:
        raise ExportError(f"caches={caches!r} is no format of caches; use one of {', '.join(FORMATS)}")
    if precision != "fp32" and caches != "fp32":
        raise ExportError(f"--kv {caches} goes with --precision fp32 alone, since its kernels are fp32; leave one of them out")
    if precision not in PRECISIONS:
        raise ExportError(f"precision={precision!r} is no float type of a bundle; use one of {', '.join(PRECISIONS)}")
    if precision != "fp32" and weights != "fp32":
        raise ExportError(
            f"--weights {weights} and --precision {precision} exclude each other, because integer weights are multiplied with "
            "fp32 activations; leave one of them out"
        )
