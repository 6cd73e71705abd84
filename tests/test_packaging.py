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
from bilevel.plugins.library import build, cpu_build
from tests import ROOT, dist

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
    shipped = {path.relative_to(plugins / "csrc").as_posix() for pattern in patterns for path in plugins.glob(pattern)}
    gpu = {name for name in shipped if name.endswith(".cpp") and not name.startswith("ort/")}
    assert {*build.SOURCES, *build.PLUGIN_SOURCES} == gpu
    assert len(shipped) == sum(path.is_file() for path in (plugins / "csrc").rglob("*"))
    assert set(module["extra-compile-args"]) <= set(cpu_build.FLAGS)


def test_version_is_one(pyproject: dict[str, Any]) -> None:
    assert pyproject["project"]["version"] == bilevel.__version__


def test_command_exists(pyproject: dict[str, Any]) -> None:
    module, _, function = pyproject["project"]["scripts"]["bilevel"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_files_named_by_the_project_exist(pyproject: dict[str, Any]) -> None:
    assert [name for name in pyproject["project"]["license-files"] if not (ROOT / name).is_file()] == []


def test_description_for_package_indexes_leads_nowhere(pyproject: dict[str, Any]) -> None:
    """An index shows it away from the repository, where a relative link or picture is broken."""
    readme = pyproject["project"]["readme"]
    targets = re.findall(r"\]\(([^)]*)\)|(?:src|href)=[\"']([^\"']*)", readme["text"])
    assert readme["content-type"] == "text/markdown" and readme["text"].strip().startswith("# bilevel")
    assert [target for pair in targets for target in pair if target and not target.startswith("https://")] == []


def test_one_wheel_serves_every_python(pyproject: dict[str, Any]) -> None:
    """Its tag starts at the oldest Python that is supported; its library is the one whose name says no version."""
    oldest = pyproject["project"]["requires-python"].removeprefix(">=")
    assert pyproject["tool"]["distutils"]["bdist_wheel"]["py-limited-api"] == f"cp{oldest.replace('.', '')}"
    (module,) = pyproject["tool"]["setuptools"]["ext-modules"]
    assert module["py-limited-api"] is True
    assert dist.CPU_LIBRARY == f"{module['name'].replace('.', '/')}.abi3.so"


def test_sdist_is_what_the_wheel_is_built_from() -> None:
    assert "prune tests" in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines()
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone: git does not list the package's files")
    files = dist.package_files()
    assert {
        "bilevel/model.py",
        "bilevel/plugins/csrc/ort/vector.h",
        "bilevel/runtime/quality/page.css",
        "bilevel/runtime/serve/page/page.html",
        "bilevel/runtime/serve/page/page.js",
        "bilevel/py.typed",
    } <= files
    assert not [name for name in files if name.endswith((".so", ".pyc", ".md"))]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.py"], r"lacks \['b.py'\]"),
        (["a.py", "b.py", "c.so"], r"should not hold \['c.so'\]"),
        (["a.py", "b.py", "b.py"], "holds a file twice"),
    ],
)
def test_archive_with_other_files_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        dist.check_names(Path("x.whl"), names, {"a.py", "b.py"})


def test_every_tool_of_make_dist_is_pinned() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (line,) = re.findall(r"\$\(DIST\)/bin/python -m pip install .* -c constraints\.txt (.*)", makefile)
    pinned = {re.split("==", name)[0] for name in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()}
    assert set(line.split()) <= pinned and "auditwheel" in line


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
