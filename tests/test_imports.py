"""The import law: who may import whom, that nothing goes in circles, and that importing a package is cheap."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

FOLDERS = {"bilevel": "bilevel", "export": "bilevel.export", "plugins": "bilevel.plugins", "runtime": "bilevel.runtime"}

# What everybody may import, and what needs the standard library only (bilevel.bundle also numpy).
LEAVES = ("bilevel.contract", "bilevel.errors", "bilevel.folders", "bilevel.machine", "bilevel.sections")
LIBRARIES = ("bilevel.plugins.library.cpu", "bilevel.plugins.library.gpu")
SERVING = ("h11", "jinja2", "prometheus_client", "pydantic", "starlette", "uvicorn")

# Package or module -> (what it may import from this repository, what else; None: anything). The longest name applies. A
# package's name allows all that is in it, but "bilevel" only what is in the folder bilevel/: the other folders share its name.
LAW: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None]] = {
    "bilevel": (("bilevel",), ("torch", "safetensors")),
    "bilevel.contract": (("bilevel.errors",), ()),
    "bilevel.errors": ((), ()),
    "bilevel.folders": (("bilevel.errors",), ()),
    "bilevel.machine": (("bilevel.errors",), ("onnxruntime",)),  # where it is asked for its CUDA provider
    "bilevel.sections": (("bilevel.errors", "bilevel.folders"), ()),
    "bilevel.bundle": ((*LEAVES, "bilevel.bundle"), ("numpy",)),
    "bilevel.bundle.chat": ((*LEAVES, "bilevel.bundle"), ("jinja2",)),  # inside a function
    "bilevel.bundle.confined": (("bilevel.errors",), ()),  # a process starts with it
    # The one door to the kernels: nothing but this module, inside a function, loads PyTorch's and Triton's side of plugins/.
    "bilevel.gpu_kernels": (("bilevel.plugins.kernels.launch",), ()),
    # And the one to the CPU library, for training.
    "bilevel.operators.cpu_library": (("bilevel", "bilevel.plugins.library.cpu"), ("torch",)),
    # What describes the kernels' launches is read without PyTorch and Triton too, by whoever writes a launcher in C.
    "bilevel.plugins.launch": ((*LEAVES, "bilevel.plugins.launch"), ()),
    "bilevel.plugins.kernels": ((*LEAVES, "bilevel.plugins.launch", "bilevel.plugins.kernels"), ("torch", "triton")),
    "bilevel.plugins.library": (
        (*LEAVES, "bilevel", "bilevel.plugins.launch", "bilevel.plugins.library", "bilevel.plugins.tensorrt.headers"),
        ("triton",),
    ),
    "bilevel.plugins.library.cpu": (LEAVES, ()),
    "bilevel.plugins.library.gpu": (LEAVES, ()),
    "bilevel.plugins.tensorrt": (
        (*LEAVES, "bilevel.plugins.kernels.launch", "bilevel.plugins.launch", "bilevel.plugins.tensorrt"),
        None,
    ),
    "bilevel.plugins.tensorrt.fields": ((*LEAVES, "bilevel.plugins.launch", "bilevel.plugins.tensorrt"), ()),
    "bilevel.plugins.tensorrt.headers": ((), ()),
    "bilevel.export": (("bilevel", "bilevel.plugins", "bilevel.export"), None),
    # Needs no PyTorch: a checkpoint is made on any machine.
    "bilevel.export.gguf": ((*LEAVES, "bilevel.export.gguf"), ("numpy", "gguf", "tokenizers")),
    # Needs no PyTorch either; onnx and Triton only where a library of GPU kernels is built.
    "bilevel.export.deploy": (
        (*LEAVES, "bilevel", "bilevel.bundle", "bilevel.plugins.library", "bilevel.export.deploy", "bilevel.export.graph"),
        ("onnx", "triton"),
    ),
    "bilevel.runtime": (
        (*LEAVES, *LIBRARIES, "bilevel.bundle", "bilevel.runtime"),
        ("numpy", "onnxruntime", "tokenizers", "rich", "matplotlib", "tensorrt", "cuda"),
    ),
    "bilevel.runtime.grammar": (
        (*LEAVES, "bilevel.bundle.confined", "bilevel.runtime.generate", "bilevel.runtime.grammar"),
        ("numpy", "llguidance"),
    ),
    # The web server needs the extra "serve"; the command loads it inside a function.
    "bilevel.runtime.serve": ((*LEAVES, "bilevel.bundle", "bilevel.runtime"), ("numpy", *SERVING)),
    "bilevel.runtime.cli.conversation": ((*LEAVES, "bilevel.bundle", "bilevel.runtime"), ("jinja2",)),
    "bilevel.runtime.cli.serve": ((*LEAVES, "bilevel.bundle", "bilevel.runtime"), SERVING),
}
# Rooms on one floor or further down: who stands earlier never imports from who stands later.
FLOORS = {
    "bilevel.plugins": ("launch", "kernels", "tensorrt", "library"),
    "bilevel.export": ("graph", "gguf", "route", "decoder", "engine", "deploy", "report", "check", "quality", "cli"),
    "bilevel.runtime": ("backend", "generate", "grammar", "schedule", "serve", "bench", "quality", "cli"),
}
HEAVY = ("torch", "triton", "tensorrt", "onnx", "onnxruntime", "onnxscript", "safetensors", "tokenizers", "rich", "cuda")


def module_names() -> dict[str, Path]:
    """Import name -> file, for every module of the four folders."""
    names = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):  # which does not follow bilevel/'s links to the other folders
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            names[".".join([package, *(part for part in inner if part != "__init__")])] = path
    return names


MODULES = module_names()


def imported(source: str, package: str, *, at_load: bool = False) -> Iterator[str]:
    """The names that a module imports, wherever the import stands; ``at_load``: only those that run when it is loaded.

    ``package`` resolves relative imports. A name given to ``require`` or ``import_module`` counts as imported.
    """
    nodes: list[ast.AST] = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        deferred = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if at_load and (deferred or for_types):
            continue
        nodes.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # ``from bilevel import ops`` names a module; ``from bilevel.config import Routing`` something inside one.
            yield from (f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("require", "import_module"):
            yield from (str(name.value) for name in node.args[:1] if isinstance(name, ast.Constant))


def package_of(module: str, path: Path) -> str:
    return module if path.name == "__init__.py" else module.rpartition(".")[0]


def breaches(module: str, names: Iterator[str]) -> list[str]:
    """The names among ``names`` that ``module`` may not import."""
    own, others = LAW[max((name for name in LAW if f"{module}.".startswith(f"{name}.")), key=len)]
    refused = []
    for name in names:
        top = name.split(".")[0]
        if top != "bilevel":
            allowed = others is None or top in others or top in sys.stdlib_module_names
        elif name == "bilevel":
            allowed = module not in LEAVES
        else:
            folder = max((package for package in FOLDERS.values() if f"{name}.".startswith(f"{package}.")), key=len)
            within = [package for package in own if f"{name}.".startswith(f"{package}.")]
            allowed = any(package != "bilevel" or folder == "bilevel" for package in within)
        if not allowed:
            refused.append(name)
    return refused


@pytest.mark.parametrize("module", MODULES)
def test_import_law(module: str) -> None:
    path = MODULES[module]
    assert breaches(module, imported(path.read_text(encoding="utf-8"), package_of(module, path))) == []


@pytest.mark.parametrize(
    "module, source, expected",
    [
        ("bilevel.contract", "import json\nfrom .errors import ContractError", []),
        ("bilevel.contract", "import numpy", ["numpy"]),
        ("bilevel.contract", "import bilevel", ["bilevel"]),
        ("bilevel.errors", "from . import contract", ["bilevel.contract"]),
        ("bilevel.bundle.format", "import numpy\nfrom bilevel.config import ModelConfig", ["bilevel.config"]),
        ("bilevel.plugins.launch.plans", "import torch", ["torch"]),
        ("bilevel.gpu_kernels", "from bilevel.plugins.library.compile import Compiled", ["bilevel.plugins.library.compile"]),
        ("bilevel.ops", "from bilevel import gpu_kernels", []),
        ("bilevel.ops", "from bilevel.plugins.kernels import launch", ["bilevel.plugins.kernels.launch"]),
        ("bilevel.model", "import torch\nfrom bilevel import ops\nfrom bilevel import contract", []),
        ("bilevel.model", "from bilevel.export.graph.module import save_onnx", ["bilevel.export.graph.module"]),
        ("bilevel.model", "import onnx", ["onnx"]),
        ("bilevel.export.graph.module", "import onnx, torch\nimport bilevel.ops", []),
        ("bilevel.export.graph.module", "from ...runtime.serve import app", ["bilevel.runtime.serve.app"]),
        ("bilevel.runtime.backend.session", "import bilevel\nfrom bilevel import contract", []),
        ("bilevel.runtime.backend.session", "def load():\n    from bilevel.config import ModelConfig", ["bilevel.config"]),
        ("bilevel.runtime.backend.session", "require('onnx')", ["onnx"]),
        ("bilevel.runtime.backend.session", "if TYPE_CHECKING:\n    import torch.nn", ["torch.nn"]),
    ],
)
def test_import_law_notices(module: str, source: str, expected: list[str]) -> None:
    assert breaches(module, imported(source, module.rpartition(".")[0])) == expected


def load_graph(sources: dict[str, tuple[str, str]]) -> dict[str, set[str]]:
    """Module -> modules of this repository that loading it loads; ``sources``: module -> (source, package)."""
    return {
        module: {name for name in imported(source, package, at_load=True) if name in sources and name != module}
        for module, (source, package) in sources.items()
    }


def test_no_import_cycles() -> None:
    sources = {module: (path.read_text(encoding="utf-8"), package_of(module, path)) for module, path in MODULES.items()}
    graph = load_graph(sources)
    assert "bilevel.config" in graph["bilevel.model"]
    graphlib.TopologicalSorter(graph).prepare()
    sources["bilevel.errors"] = ("import bilevel.model", "bilevel")
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(load_graph(sources)).prepare()


@pytest.mark.parametrize("package", FLOORS)
def test_rooms_import_downwards(package: str) -> None:
    floors = {f"{package}.{room}": floor for floor, room in enumerate(FLOORS[package])}
    rooms = {".".join(module.split(".")[:3]) for module in MODULES if module.startswith(f"{package}.")}
    assert rooms == set(floors)
    for module, path in MODULES.items():
        floor = floors.get(".".join(module.split(".")[:3]), len(floors))
        for name in imported(path.read_text(encoding="utf-8"), package_of(module, path)):
            assert floors.get(".".join(name.split(".")[:3]), 0) <= floor, f"{module} imports {name}, which stands above it"


def test_rooms_are_small_and_say_what_they_are_for() -> None:
    """At most about 20 source files in a folder, and a sentence in every package."""
    folders: dict[Path, int] = {}
    for path in [*MODULES.values(), *(ROOT / "tests").rglob("*.py")]:
        folders[path.parent] = folders.get(path.parent, 0) + (path.name != "__init__.py")
    assert {str(folder): count for folder, count in folders.items() if count > 20} == {}
    silent = [
        module
        for module, path in MODULES.items()
        if path.name == "__init__.py" and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def run_python(program: str) -> list[str]:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return result.stdout.split()


@pytest.mark.parametrize("package", [*FOLDERS.values(), "bilevel.bundle", *LEAVES])
def test_import_is_light(package: str) -> None:
    assert run_python(f"import sys, {package}; print(*(m for m in {HEAVY} if m in sys.modules))") == []


def test_help_imports_the_standard_library_only() -> None:
    program = (
        "import contextlib, io, sys\nbefore = set(sys.modules)\nfrom bilevel.runtime.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main(['--help'])\n"
        "print(*(set(sys.modules) - before))"
    )
    loaded = {name.split(".")[0] for name in run_python(program)}
    assert "bilevel" in loaded and loaded <= {"bilevel", *sys.stdlib_module_names}


def test_runtime_imports_without_its_optional_packages() -> None:
    """Every module but the web server's loads where only numpy is installed, and loads nothing of the PyTorch side."""
    modules = [m for m in MODULES if m.startswith("bilevel.runtime") and not m.startswith("bilevel.runtime.serve")]
    program = (
        f"import sys, importlib\nsys.modules.update(dict.fromkeys({HEAVY + SERVING}))\n"
        f"for module in {modules}: importlib.import_module(module)\n"
        "print(*(m for m in sys.modules if m.startswith(('bilevel.export', 'bilevel.model', 'bilevel.ops'))), 'loaded')"
    )
    assert run_python(program) == ["loaded"]
