"""A model in several files: read as one, or refused by name with the remedy."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from bilevel.errors import CheckpointError
from bilevel.export.gguf.convert import import_gguf
from bilevel.export.gguf.parts import read_parts
from bilevel.runtime.cli.main import main
from tests.bilevel.families.released import make
from tests.support.gguf_files import Metadata, write_gguf
from tests.support.gguf_released import converted_metadata, converted_tensors, released_files, tiny_vocabulary

CONFIG, WEIGHTS = released_files(make("olmoe"))
TENSORS = converted_tensors("olmoe", CONFIG, WEIGHTS)
METADATA = {**converted_metadata("olmoe", CONFIG), **tiny_vocabulary()}


def part_name(number: int, count: int = 3) -> str:
    return f"m-{number:05d}-of-{count:05d}.gguf"


def written(folder: Path, number: int, changes: Metadata | None = None, extra: dict[str, np.ndarray] | None = None) -> Path:
    """Part ``number`` (from 1) of three as llama-gguf-split writes it: a third of the tensors, metadata in the first alone."""
    places: Metadata = {"split.no": number - 1, "split.count": 3, "split.tensors.count": len(TENSORS)}
    metadata = {**(METADATA if number == 1 else {}), **places, **(changes or {})}
    names = list(TENSORS)[(number - 1) * len(TENSORS) // 3 : number * len(TENSORS) // 3]
    tensors = {**{name: TENSORS[name] for name in names}, **(extra or {})}
    return write_gguf(
        folder / part_name(number), {key: metadata[key] for key in metadata if metadata[key] is not None}, tensors
    )


def write_all(folder: Path) -> Path:
    for number in (2, 3):
        written(folder, number)
    return written(folder, 1)


def test_parts_are_the_whole(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", METADATA, TENSORS)
    import_gguf(whole, tmp_path / "one")
    report = import_gguf(write_all(tmp_path), tmp_path / "three")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes(), name
    assert sum(report.kinds.values()) == len(TENSORS)


def test_the_gguf_packages_own_parts(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m", "olmoe", split_max_tensors=5)
    for key, value in METADATA.items():
        if isinstance(value, (int, float, str)) and key != "general.architecture":
            {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)
    for name, array in TENSORS.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file(tmp_path / "m.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first, *others = sorted(tmp_path.glob("m-*.gguf"))
    assert len(others) == len(TENSORS) // 5
    assert list(read_parts(first).tensors) == list(TENSORS)


def assert_refused(path: Path, named: Path, expected: str) -> None:
    before = sorted(path.parent.iterdir())
    with pytest.raises(CheckpointError, match=rf"^{named} {expected}"):
        import_gguf(path, path.parent / "checkpoint")
    assert sorted(path.parent.iterdir()) == before


def test_a_missing_part(tmp_path: Path) -> None:
    first = write_all(tmp_path)
    (tmp_path / part_name(2)).unlink()
    assert_refused(first, first, rf"is the first of 3 parts, and {part_name(2)} is missing beside it; put all parts into one")


def test_another_part_than_the_first(tmp_path: Path) -> None:
    write_all(tmp_path)
    second = tmp_path / part_name(2)
    assert_refused(second, second, rf"is part 2 of 3; give the first one, {part_name(1)}")


def test_a_first_part_of_another_name(tmp_path: Path) -> None:
    renamed = write_all(tmp_path).rename(tmp_path / "m.gguf")
    assert_refused(renamed, renamed, r"is the first of 3 parts, .*; rename it to model-00001-of-00003\.gguf, and the others")
    renamed = renamed.rename(tmp_path / part_name(1, 4))
    assert_refused(renamed, renamed, rf"is the first of 3 parts, .*; rename it to {part_name(1)}, and the others likewise")


@pytest.mark.parametrize(
    "number, changes, extra, named, expected",
    [
        (2, {"split.count": 4}, None, 2, r"gives split\.count=4, and by its name it is 3; download it again, or split"),
        (3, {"split.no": 1}, None, 3, r"gives split\.no=1, and by its name it is 2; download it again"),
        (3, {"split.no": None}, None, 3, r"lacks the metadata split\.no"),
        (2, {"split.count": "3"}, None, 2, r"gives split\.count as '3', which is no int"),
        (1, {"split.count": "3"}, None, 1, r"gives split\.count as '3', which is no int"),
        (1, {"split.no": None}, None, 1, r"lacks the metadata split\.no"),
        (
            1,
            {"split.tensors.count": 7},
            None,
            1,
            rf"gives split\.tensors\.count=7, and its 3 parts store {len(TENSORS)} tensors",
        ),
        (
            3,
            {},
            {"token_embd.weight": TENSORS["token_embd.weight"]},
            3,
            r"stores the tensor token_embd\.weight, as an earlier part does",
        ),
    ],
)
def test_parts_that_disagree(
    number: int, changes: Metadata, extra: dict[str, np.ndarray] | None, named: int, expected: str, tmp_path: Path
) -> None:
    first = write_all(tmp_path)
    written(tmp_path, number, changes, extra)
    assert_refused(first, tmp_path / part_name(named), expected)


def test_a_truncated_or_foreign_part(tmp_path: Path) -> None:
    first, second = write_all(tmp_path), tmp_path / part_name(2)
    contents = second.read_bytes()
    second.write_bytes(contents[:-1])
    assert_refused(first, second, r"is truncated: the tensor \S+ ends at byte .*; download it again")
    second.write_bytes(b"PK\3\4" + contents)
    assert_refused(first, second, r"is no GGUF file")


def test_a_damaged_weight_names_its_part(tmp_path: Path) -> None:
    first, third = write_all(tmp_path), tmp_path / part_name(3)
    third.write_bytes(third.read_bytes()[:-4] + np.float32(np.nan).tobytes())
    with pytest.raises(CheckpointError, match=rf"^{third} holds NaN or infinite weights in "):
        import_gguf(first, tmp_path / "checkpoint")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(write_all(tmp_path)), str(tmp_path / "checkpoint")]) == 0
    assert "olmoe: 2 layers" in capsys.readouterr().out
