"""The import law: who may import whom, that nothing goes in circles, and that importing a package is cheap."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"bilevel": "bilevel", "export": "bilevel.export", "plugins": "bilevel.plugins", "runtime": "bilevel.runtime"}
SHARED = (
    "bilevel.plugins.contract",
    "bilevel.plugins.cpu_library",
    "bilevel.plugins.errors",
    "bilevel.plugins.gpu_kernels",
    "bilevel.plugins.kernel_library",
)

PLANNING = tuple(
    f"bilevel.plugins.{name}"
    for name in ("contract", "errors", "launches", "plans_caches", "plans_experts", "plans_routing", "tiles")
)

SERVING = ("h11", "jinja2", "prometheus_client", "pydantic", "starlette", "uvicorn")
SERVE_MODULES = sorted(path.stem for path in (ROOT / "runtime").glob("serve_*.py"))

# Module or package -> (what it may import from this repository, what else; None: anything). The longest name applies.
# "bilevel" alone is the package itself: its docstring and version.
LAW: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None]] = {
    "bilevel": (("bilevel", *SHARED), ("torch", "safetensors")),
    "bilevel.plugins": (("bilevel.plugins",), None),
    "bilevel.plugins.contract": (("bilevel.plugins.errors",), ()),
    "bilevel.plugins.cpu_library": (("bilevel.plugins.errors",), ()),
    "bilevel.plugins.errors": ((), ()),
    # The one door to the kernels: nothing but this module, inside a function, loads PyTorch's and Triton's side of plugins/.
    "bilevel.plugins.gpu_kernels": (("bilevel.plugins.triton_launch",), ()),
    "bilevel.plugins.kernel_library": (("bilevel.plugins.contract", "bilevel.plugins.errors"), ()),
    # What describes the kernels' launches is read without PyTorch and Triton too, by whoever writes a launcher in C.
    "bilevel.plugins.launches": (("bilevel.plugins.contract", "bilevel.plugins.errors", "bilevel.plugins.tiles"), ()),
    "bilevel.plugins.plans": (PLANNING, ()),
    "bilevel.plugins.plans_caches": (PLANNING, ()),
    "bilevel.plugins.plans_experts": (PLANNING, ()),
    "bilevel.plugins.plans_routing": (PLANNING, ()),
    "bilevel.plugins.tensorrt_fields": (
        (*PLANNING, "bilevel.plugins.contract_header", "bilevel.plugins.plans"),
        (),
    ),
    "bilevel.plugins.tensorrt_headers": ((), ()),
    "bilevel.plugins.tiles": (("bilevel.plugins.errors",), ()),
    "bilevel.export": (("bilevel", "bilevel.plugins", "bilevel.export"), None),
    "bilevel.runtime": (
        ("bilevel.runtime", *SHARED),
        ("numpy", "onnxruntime", "tokenizers", "rich", "matplotlib", "tensorrt", "cuda"),
    ),
    # The web server's modules need the extra "serve"; cli_serve loads them, inside a function.
    "bilevel.runtime.cli_serve": (("bilevel.runtime", *SHARED), SERVING),
    **{f"bilevel.runtime.{name}": (("bilevel.runtime", *SHARED), ("numpy", *SERVING)) for name in SERVE_MODULES},
}
HEAVY = ("torch", "triton", "tensorrt", "onnx", "onnxruntime", "onnxscript", "safetensors", "tokenizers", "rich", "cuda")


def module_names() -> dict[str, Path]:
    """Import name -> file, for every module of the four folders."""
    names = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
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
    found = []
    for name in names:
        top = name.split(".")[0]
        if top != "bilevel":
            allowed = others is None or top in others or top in sys.stdlib_module_names
        elif name == "bilevel":
            allowed = module not in SHARED
        else:
            # "bilevel" permits the modules of the folder bilevel/, not the other folders, which share its name.
            package = max((package for package in FOLDERS.values() if f"{name}.".startswith(f"{package}.")), key=len)
            allowed = package in own or name in own
        if not allowed:
            found.append(name)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_import_law(module: str) -> None:
    path = MODULES[module]
    assert breaches(module, imported(path.read_text(encoding="utf-8"), package_of(module, path))) == []


@pytest.mark.parametrize(
    "module, source, expected",
    [
        ("bilevel.plugins.contract", "import json\nfrom .errors import ContractError", []),
        ("bilevel.plugins.contract", "import numpy", ["numpy"]),
        ("bilevel.plugins.contract", "import bilevel", ["bilevel"]),
        ("bilevel.plugins.errors", "from . import contract", ["bilevel.plugins.contract"]),
        ("bilevel.plugins.plans", "import torch", ["torch"]),
        (
            "bilevel.plugins.gpu_kernels",
            "from bilevel.plugins.triton_compile import Compiled",
            ["bilevel.plugins.triton_compile"],
        ),
        ("bilevel.ops", "from bilevel.plugins import gpu_kernels", []),
        ("bilevel.ops", "from bilevel.plugins import triton_launch", ["bilevel.plugins.triton_launch"]),
        ("bilevel.model", "import torch\nfrom bilevel import ops\nfrom bilevel.plugins import contract", []),
        ("bilevel.model", "from bilevel.export.module import save_onnx", ["bilevel.export.module"]),
        ("bilevel.model", "import onnx", ["onnx"]),
        ("bilevel.export.module", "import onnx, torch\nimport bilevel.ops", []),
        ("bilevel.export.module", "from ..runtime import bundle", ["bilevel.runtime.bundle"]),
        ("bilevel.runtime.bundle", "import bilevel\nfrom bilevel.plugins import contract", []),
        ("bilevel.runtime.bundle", "def load():\n    from bilevel.config import ModelConfig", ["bilevel.config"]),
        ("bilevel.runtime.bundle", "require('onnx')", ["onnx"]),
        ("bilevel.runtime.bundle", "if TYPE_CHECKING:\n    import torch.nn", ["torch.nn"]),
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
    sources["bilevel.plugins.errors"] = ("import bilevel.model", "bilevel.plugins")
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(load_graph(sources)).prepare()


def run_python(program: str) -> list[str]:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return result.stdout.split()


@pytest.mark.parametrize("package", FOLDERS.values())
def test_import_is_light(package: str) -> None:
    assert run_python(f"import sys, {package}; print(*(m for m in {HEAVY} if m in sys.modules))") == []


def test_runtime_imports_without_its_optional_packages() -> None:
    """Every module but the web server's loads where only numpy is installed, and loads nothing of the PyTorch side."""
    web = tuple(f"bilevel.runtime.{name}" for name in SERVE_MODULES)
    modules = [module for module in MODULES if module.startswith("bilevel.runtime") and module not in web]
    program = (
        f"import sys, importlib\nsys.modules.update(dict.fromkeys({HEAVY + SERVING}))\n"
        f"for module in {modules}: importlib.import_module(module)\n"
        "print(*(m for m in sys.modules if m.startswith(('bilevel.export', 'bilevel.model', 'bilevel.ops'))), 'loaded')"
    )
    assert run_python(program) == ["loaded"]
