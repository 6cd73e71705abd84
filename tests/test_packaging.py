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
from bilevel.plugins import errors, kernel_build

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_is_listed(pyproject: dict[str, Any]) -> None:
    setuptools = pyproject["tool"]["setuptools"]
    found = {
        ".".join([name, *init.parent.relative_to(ROOT / folder).parts])
        for name, folder in setuptools["package-dir"].items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert set(setuptools["packages"]) == found


def test_every_package_is_imported_from_its_folder(pyproject: dict[str, Any]) -> None:
    for name, folder in pyproject["tool"]["setuptools"]["package-dir"].items():
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        assert Path(spec.origin) == ROOT / folder / "__init__.py"


def test_package_data_exists(pyproject: dict[str, Any]) -> None:
    setuptools = pyproject["tool"]["setuptools"]
    for name, patterns in setuptools["package-data"].items():
        for pattern in patterns:
            assert list((ROOT / setuptools["package-dir"][name]).glob(pattern)), pattern
    assert (ROOT / "bilevel" / "py.typed").is_file()


def test_every_source_is_listed_for_the_library_it_belongs_to(pyproject: dict[str, Any]) -> None:
    """What is not listed is not compiled, is missing from the sdist or the wheel, or changes without a rebuild."""
    setuptools = pyproject["tool"]["setuptools"]
    (module,) = setuptools["ext-modules"]
    for_gpu = [path for pattern in setuptools["package-data"]["bilevel.plugins"] for path in (ROOT / "plugins").glob(pattern)]
    gpu = {path.relative_to(ROOT).as_posix() for path in for_gpu}
    cpu = {path.relative_to(ROOT).as_posix() for path in (ROOT / "plugins" / "csrc").iterdir()} - gpu
    assert sorted(module["sources"]) == sorted(name for name in cpu if name.endswith(".cpp"))
    assert sorted(module["depends"]) == sorted(name for name in cpu if not name.endswith(".cpp"))
    compiled = {f"plugins/csrc/{name}" for name in (*kernel_build.SOURCES, *kernel_build.PLUGIN_SOURCES)}
    assert compiled == {name for name in gpu if name.endswith(".cpp")}


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
