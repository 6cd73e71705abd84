"""Where NVIDIA's headers are looked for, and what is said when they are not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from bilevel.plugins.tensorrt import headers as tensorrt_headers
from bilevel.plugins.tensorrt.headers import Headers, find_headers

OLD_STYLE = "#define NV_TENSORRT_MAJOR {} //!< major\n#define NV_TENSORRT_MINOR {}\n#define NV_TENSORRT_PATCH {}\n"
NEW_STYLE = "".join(
    f"#define TRT_{part}_ENTERPRISE {{}}\n#define NV_TENSORRT_{part} TRT_{part}_ENTERPRISE //!< version.\n"
    for part in ("MAJOR", "MINOR", "PATCH")
)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An SDK with headers of 10.3.0, and a machine that has nothing else."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TENSORRT_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tensorrt_headers, "_PLACES", ())
    monkeypatch.setattr(tensorrt_headers, "_CUDA_PLACES", ())
    monkeypatch.setattr(tensorrt_headers, "_CUDA_WHEELS", ())
    monkeypatch.setattr(tensorrt_headers.platform, "machine", lambda: "none")
    include = tmp_path / "sdk" / "include"
    include.mkdir(parents=True)
    (include / "NvInferRuntime.h").touch()
    (include / "cuda_runtime_api.h").touch()
    (include / "NvInferVersion.h").write_text(OLD_STYLE.format(10, 3, 0))
    return include.parent


def test_no_headers(root: Path) -> None:
    found = find_headers()
    assert isinstance(found, str) and "libnvinfer-headers-dev" in found and "TENSORRT_ROOT" in found


@pytest.mark.parametrize("below", ["", "include"])
def test_the_variable_names_them(below: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORRT_ROOT", str(root / below))
    assert find_headers() == Headers((root / "include",), "10.3.0")


def test_a_wrong_variable_is_told_even_where_the_system_has_headers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_headers, "_PLACES", (str(root / "include"),))
    assert find_headers() == Headers((root / "include",), "10.3.0")
    monkeypatch.setenv("TENSORRT_ROOT", "/nowhere")
    found = find_headers()
    assert isinstance(found, str) and "TENSORRT_ROOT=/nowhere holds no include/NvInferRuntime.h" in found


@pytest.mark.parametrize("style", [OLD_STYLE, NEW_STYLE])
def test_both_styles_of_version(style: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORRT_ROOT", str(root))
    (root / "include" / "NvInferVersion.h").write_text(style.format(11, 4, 1))
    found = find_headers()
    assert isinstance(found, Headers) and found.version == "11.4.1"


@pytest.mark.parametrize(
    "version, message",
    [(OLD_STYLE.format(8, 6, 1), "TensorRT 8.6.1, the plugins need 10.0 or newer"), ("", "names no version")],
)
def test_versions_that_do_not_serve(version: str, message: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORRT_ROOT", str(root))
    (root / "include" / "NvInferVersion.h").write_text(version)
    found = find_headers()
    assert isinstance(found, str) and message in found


def test_the_cuda_runtime_header(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORRT_ROOT", str(root))
    (root / "include" / "cuda_runtime_api.h").unlink()
    found = find_headers()
    assert isinstance(found, str) and "CUDA_HOME" in found
    cuda = tmp_path / "cuda" / "include"
    cuda.mkdir(parents=True)
    (cuda / "cuda_runtime_api.h").touch()
    monkeypatch.setenv("CUDA_HOME", str(cuda.parent))
    assert find_headers() == Headers((root / "include", cuda), "10.3.0")
