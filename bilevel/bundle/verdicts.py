"""Verdicts in ``bundle.json``: what was checked, with which result."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from bilevel.bundle.values import FORMAT, FORMAT_VERSION, MANIFEST
from bilevel.errors import BundleError


def read_manifest(bundle: Path) -> dict[str, Any]:
    """``bundle.json``, or BundleError."""
    path = bundle / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{bundle} holds no {MANIFEST}; make a bundle with: bilevel export CHECKPOINT {bundle}") from None
    except ValueError as error:
        raise BundleError(f"{path} is not valid JSON ({error}); export the bundle again with --force") from None
    found = (manifest.get("format"), manifest.get("format_version")) if isinstance(manifest, dict) else (None, None)
    if found != (FORMAT, FORMAT_VERSION):
        raise BundleError(
            f"{path} has format {found[0]} version {found[1]}, this bilevel checks {FORMAT} version {FORMAT_VERSION}; "
            "export the bundle again with --force"
        )
    kinds = {"files": dict, "config": dict, "precision": str}
    for key, kind in kinds.items():
        if not isinstance(manifest.get(key), kind):
            raise BundleError(f"{path} does not give {key} as it should; export the bundle again with --force")
    return dict(manifest)


def record_verdict(bundle: Path, manifest: dict[str, Any], verdict: dict[str, Any]) -> None:
    """Append a check's ``verdict`` and the time to ``bundle.json``, which stays whole if this is interrupted."""
    recorded = verdict | {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    manifest["checks"] = [*manifest.get("checks", []), recorded]
    partial = bundle / f".{MANIFEST}.partial"
    try:
        partial.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, bundle / MANIFEST)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise BundleError(f"the verdict could not be recorded in {bundle / MANIFEST} ({error.strerror})") from error
