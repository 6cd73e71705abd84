"""pyproject.toml lists what is there: the four folders as one package, its version, its command."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import bilevel
from bilevel import errors
from bilevel.plugins.library import build
from tests import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_folder_with_modules_is_a_package() -> None:
    """What has no ``__init__.py`` is left out of the wheel."""
    modules = [path for folder in ("bilevel", "export", "plugins", "runtime") for path in (ROOT / folder).rglob("*.py")]
    assert [str(path) for path in modules if not path.with_name("__init__.py").is_file()] == []


@pytest.mark.parametrize("folder", ["export", "plugins", "runtime"])
def test_every_package_is_imported_from_its_folder(folder: str) -> None:
    spec = importlib.util.find_spec(f"bilevel.{folder}")
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).resolve() == ROOT / folder / "__init__.py"
    assert (ROOT / "bilevel" / folder).readlink() == Path("..") / folder


def test_package_data_exists(pyproject: dict[str, Any]) -> None:
    for name, patterns in pyproject["tool"]["setuptools"]["package-data"].items():
        for pattern in patterns:
            assert list((ROOT / name.replace(".", "/")).glob(pattern)), pattern
    assert (ROOT / "bilevel" / "py.typed").is_file()


def test_every_source_is_listed_for_the_library_it_belongs_to(pyproject: dict[str, Any]) -> None:
    """What is not listed is not compiled, is missing from the sdist or the wheel, or changes without a rebuild."""
    (module,) = pyproject["tool"]["setuptools"]["ext-modules"]
    plugins = ROOT / "bilevel" / "plugins"
    cpu = {path.relative_to(ROOT).as_posix() for path in (plugins / "csrc" / "ort").iterdir()}
    assert sorted(module["sources"]) == sorted(name for name in cpu if name.endswith(".cpp"))
    assert sorted(module["depends"]) == sorted(name for name in cpu if not name.endswith(".cpp"))
    patterns = pyproject["tool"]["setuptools"]["package-data"]["bilevel.plugins"]
    gpu = {path.relative_to(plugins / "csrc").as_posix() for pattern in patterns for path in plugins.glob(pattern)}
    assert {*build.SOURCES, *build.PLUGIN_SOURCES} == {name for name in gpu if name.endswith(".cpp")}
    assert len(cpu) + len(gpu) == sum(path.is_file() for path in (plugins / "csrc").rglob("*"))


def test_version_is_one(pyproject: dict[str, Any]) -> None:
    assert pyproject["project"]["version"] == bilevel.__version__


def test_command_exists(pyproject: dict[str, Any]) -> None:
    module, _, function = pyproject["project"]["scripts"]["bilevel"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_files_named_by_the_project_exist(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    assert [name for name in (project["readme"], *project["license-files"]) if not (ROOT / name).is_file()] == []


def test_missing_dependency_names_an_extra_that_brings_it(pyproject: dict[str, Any]) -> None:
    """What ``require`` tells a user to install does install the package."""
    extras = pyproject["project"]["optional-dependencies"]
    for package, extra in errors._EXTRAS.items():
        brought = {re.split(r"[^\w-]", requirement)[0] for requirement in extras[extra]}
        assert {"cuda": "cuda-bindings"}.get(package, package) in brought, f"bilevel[{extra}] does not bring {package}"


def test_require(monkeypatch: pytest.MonkeyPatch) -> None:
    assert errors.require("json.decoder").JSONDecoder
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(errors.MissingDependency, match=r"tokenizers is not installed: pip install 'bilevel\[cpu\]'"):
        errors.require("tokenizers")
