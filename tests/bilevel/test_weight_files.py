"""How tensors are read from their files; what the files may be is tested with the checkpoints."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from bilevel.weight_files import opened


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    tensors = {"half": torch.rand(3, 5).half(), "wide": torch.rand(4, 2, dtype=torch.float64), "none": torch.rand(0, 3)}
    tensors |= {"one": torch.tensor(2.5), "brain": torch.rand(7).bfloat16(), "large": torch.rand(4 << 20)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_weights_are_read_as_they_are_stored(weights: Path) -> None:
    with opened(weights) as file:
        for key, value in load_file(weights).items():
            assert file.get_tensor(key).dtype == value.dtype and torch.equal(file.get_tensor(key), value)


def test_weights_are_read_a_piece_at_a_time(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One read of a file gives 2 GiB at most; one that gives nothing says that the file became shorter."""
    with opened(weights) as file:
        plain = file._plain  # type: ignore[attr-defined]
        pieces = SimpleNamespace(seek=plain.seek, readinto=lambda view: plain.readinto(view[:13]))
        with monkeypatch.context() as patched:
            patched.setattr(file, "_plain", pieces)
            assert torch.equal(file.get_tensor("half"), load_file(weights)["half"])
            pieces.readinto = lambda view: 0
            with pytest.raises(OSError, match="within half"):
                file.get_tensor("half")


def test_weights_are_not_mapped(weights: Path) -> None:
    """A mapped file would count against the memory of an export a second time."""

    def mapped() -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))

    with opened(weights) as file:
        file.get_tensor("one")
        before = mapped()
        assert file.get_tensor("large").sum() > 0
        assert mapped() - before < 8 << 10  # KiB; the tensor has 16 MiB
