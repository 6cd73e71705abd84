"""The package as a wheel for another machine, and the pins of what it needs."""

from __future__ import annotations

import base64
import csv
import email
import hashlib
import importlib.metadata
import io
import re
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename

from bilevel.errors import DeployError
from bilevel.export.deploy import requirements
from bilevel.export.deploy.requirements import download_wheels, pins, platform_options, requirements_text
from bilevel.export.deploy.targets import NAMES, PYTHONS, find_target
from bilevel.export.deploy.wheel import LIBRARY, wheel_tag, write_wheel
from tests import ROOT, dist
from tests.support.cpu_library import required_library


def test_the_wheel_is_the_repositorys_package_with_the_library(tmp_path: Path) -> None:
    path = write_wheel(tmp_path, "aarch64", required_library(), "2.27")
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    info = "bilevel-0.1.0.dist-info"
    own = {name for name in contents if not name.startswith(f"{info}/")}
    if (ROOT / ".git").exists():
        assert own == dist.package_files() | {LIBRARY}
    assert contents[LIBRARY] == required_library().read_bytes()
    assert b"Requires-Dist: onnxruntime" in contents[f"{info}/METADATA"]
    assert b"bilevel = bilevel.runtime.cli.main:main" in contents[f"{info}/entry_points.txt"]
    rows = {name: (digest, size) for name, digest, size in csv.reader(io.StringIO(contents[f"{info}/RECORD"].decode()))}
    assert set(rows) == set(contents) and rows.pop(f"{info}/RECORD") == ("", "")
    for name, (digest, size) in rows.items():
        encoded = base64.urlsafe_b64encode(hashlib.sha256(contents[name]).digest()).rstrip(b"=").decode()
        assert (digest, int(size)) == (f"sha256={encoded}", len(contents[name])), name


@pytest.mark.parametrize(
    ("machine", "glibc", "tag"),
    [
        ("aarch64", "2.27", "cp310-abi3-manylinux_2_27_aarch64"),
        ("x86_64", "2.4", "cp310-abi3-manylinux_2_17_x86_64"),
        ("aarch64", None, "py3-none-any"),
    ],
)
def test_the_tag_says_who_can_load_the_library(machine: str, glibc: str | None, tag: str) -> None:
    assert wheel_tag(machine, glibc) == tag
    _, _, _, tags = parse_wheel_filename(f"bilevel-0.1.0-{tag}.whl")
    assert [str(each) for each in tags] == [tag]


def constraints(python: str) -> dict[str, str]:
    """constraints.txt as pip reads it for a Python on Linux."""
    environment = {"python_version": python, "platform_system": "Linux", "platform_machine": "aarch64"}
    found = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate(environment):
                found[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_are_the_versions_that_were_verified_together(python: str) -> None:
    verified = constraints(python)
    for name, version in pins(find_target("linux-aarch64", python)).items():
        assert verified[canonicalize_name(name)] == version, name


@pytest.mark.parametrize("name", ["orin-jp62", "thor-jp7"])
def test_a_board_also_gets_what_builds_an_engine(name: str) -> None:
    target = find_target(name)
    assert target.board is not None
    found = pins(target)
    assert found["cuda-bindings"].split(".")[0] == str(target.board.cuda[0])
    verified = constraints(target.python)
    assert {"onnx", "onnxscript", "onnx-ir", "ml_dtypes"} <= set(found)
    different = {package for package, version in found.items() if verified[canonicalize_name(package)] != version}
    assert different <= set(target.board.bindings)


def test_pins_are_whole() -> None:
    """Whatever a pinned package asks for, of those that are installed here, is pinned too: pip is told to look no further."""
    for name, roots in (("linux-x86_64", ["bilevel[cpu,serve]"]), ("thor-jp7", ["bilevel[cpu,serve]", "onnx", "onnxscript"])):
        python = {"linux-x86_64": "3.11", "thor-jp7": "3.12"}[name]
        target = find_target(name, python)
        pinned, todo, seen = {canonicalize_name(package) for package in pins(target)}, [Requirement(r) for r in roots], set()
        while todo:
            requirement = todo.pop()
            package = canonicalize_name(requirement.name)
            if (package, *requirement.extras) in seen:
                continue
            seen.add((package, *requirement.extras))
            assert package == "bilevel" or package in pinned, f"{name} lacks {package}"
            for line in importlib.metadata.requires(package) or []:
                asked = Requirement(line)
                environment = {"python_version": python, "platform_system": "Linux", "sys_platform": "linux"}
                extras = requirement.extras or {""}
                if asked.marker is None or any(asked.marker.evaluate({**environment, "extra": extra}) for extra in extras):
                    todo.append(asked)
        assert {name for name, *_ in seen} - {"bilevel"} == pinned - set(target.board.bindings if target.board else ())


@pytest.mark.real
@pytest.mark.parametrize("name", ["orin-jp62", "thor-jp7"])
def test_a_boards_wheels_ask_for_nothing_else(name: str, tmp_path: Path) -> None:
    """Fetched for its Python, glibc and kind of CPU, which are not this machine's: each requirement is another wheel."""
    target = find_target(name)
    (tmp_path / "requirements.txt").write_text(requirements_text(target), encoding="utf-8")
    assert download_wheels(target, tmp_path / "requirements.txt", tmp_path) == len(pins(target))
    metadata = {}
    for path in (*tmp_path.glob("*.whl"), write_wheel(tmp_path, target.machine, None, None)):
        with zipfile.ZipFile(path) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
            message = email.message_from_bytes(archive.read(member))
            metadata[canonicalize_name(message["Name"])] = message
    environment = {"python_version": target.python, "platform_system": "Linux", "platform_machine": target.machine}
    for package, message in metadata.items():
        assert SpecifierSet(message["Requires-Python"] or "").contains(f"{target.python}.0"), package
        for line in message.get_all("Requires-Dist") or []:
            asked, extras = Requirement(line), ("", "cpu", "serve") if package == "bilevel" else ("",)
            if asked.marker is None or any(asked.marker.evaluate({**environment, "extra": extra}) for extra in extras):
                version = metadata[canonicalize_name(asked.name)]["Version"]
                assert asked.specifier.contains(version, prereleases=True), f"{package} asks for {line}, which is {version}"


@pytest.mark.parametrize("name", NAMES)
def test_pip_is_asked_for_wheels_of_the_target(name: str) -> None:
    target = find_target(name, None if name in ("orin-jp62", "thor-jp7") else "3.13")
    options = platform_options(target)
    newest = f"manylinux_2_{target.glibc.split('.')[1]}_{target.machine}"
    assert options[options.index("--platform") + 1] == newest and f"manylinux_2_17_{target.machine}" in options
    assert options[options.index("--python-version") + 1] == target.python
    lines = requirements_text(target).splitlines()[1:]
    names = [line.partition("==")[0].lower() for line in lines]
    assert names == sorted(names) and all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in lines)


def test_wheels_that_pip_cannot_fetch_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = tmp_path / "requirements.txt"
    wanted.write_text("numpy==0.0.0\n", encoding="utf-8")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        DeployError, match=r"pip could not fetch the wheels \(.*numpy==0\.0\.0.*\); check the network"
    ) as caught:
        download_wheels(find_target("linux-x86_64", "3.11"), wanted, tmp_path / "wheels")
    assert "\n" not in str(caught.value)


def test_a_marker_that_is_not_understood_is_no_silent_choice() -> None:
    with pytest.raises(AssertionError, match="not understood"):
        requirements._applies("numpy==1; sys_platform == 'linux'", "3.11")
