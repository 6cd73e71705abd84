"""Tests. The folders are those of the sources; doubles/ stands in for what is not here, gpu/ is `make gpu-test`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
