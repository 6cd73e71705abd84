"""The C++ copy of the contract is what ``plugins/tensorrt/contract_header.py`` makes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bilevel import contract
from bilevel.plugins.tensorrt import contract_header


def test_the_header_is_not_stale() -> None:
    made = contract_header.make_header()
    assert contract_header.HEADER.read_text(encoding="utf-8") == made, "run: python -m bilevel.plugins.tensorrt.contract_header"


def test_a_change_of_the_contract_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    committed = contract_header.HEADER.read_text(encoding="utf-8")
    first, *others = contract.GPU_OPS
    for changed in (
        replace(first, version=2),
        replace(first, inputs=(replace(first.inputs[0], dtype="int32"), *first.inputs[1:])),
        replace(first, attributes=(replace(first.attributes[0], maximum=7), *first.attributes[1:])),
        replace(first, attributes=first.attributes[1:]),
    ):
        monkeypatch.setattr(contract, "GPU_OPS", (changed, *others))
        assert contract_header.make_header() != committed
