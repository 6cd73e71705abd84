"""What a deployment folder holds, for every target; what is refused; that nothing is left half written."""

from __future__ import annotations

import configparser
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from bilevel.bundle.format import load_bundle
from bilevel.bundle.manifest import MANIFEST
from bilevel.errors import BilevelError, BundleError, DeployError, KernelError
from bilevel.export.deploy import folder, libraries
from bilevel.export.deploy.libraries import gpu_problem, version_problem
from bilevel.export.deploy.targets import NAMES, find_target
from bilevel.plugins.library.gpu import trust
from tests.doubles.bundle import edit_manifest, file_record
from tests.export.deploy.conftest import Deploy, fake_gpu_library

BOARDS = ("orin-jp62", "thor-jp7")
KERNELS = "kernels/aarch64/libbilevel_kernels.so"


def trusted(library: Path) -> Path:
    """As ``bilevel kernels build`` and ``bilevel kernels trust`` leave one."""
    trust(library)
    return library


def names_below(path: Path) -> list[str]:
    return sorted(str(each.relative_to(path)) for each in path.rglob("*") if not each.is_dir())


@pytest.mark.parametrize("target", NAMES)
def test_every_file_is_listed_with_its_hash(deployed: Deploy, target: str, tmp_path: Path) -> None:
    written = deployed(target)
    manifest = json.loads((written.path / "deploy.json").read_text(encoding="utf-8"))
    assert manifest == written.manifest and manifest["target"] == target
    assert sorted([*manifest["files"], "deploy.json"]) == names_below(written.path)
    for name, record in manifest["files"].items():
        content = (written.path / name).read_bytes()
        assert record == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}, name
    assert not [path for path in written.path.rglob("*") if path.is_symlink()]
    assert load_bundle(written.path / "bundle").files == load_bundle(tmp_path / "bundle").files
    assert written.starts and manifest["starts_on_cpu"]


@pytest.mark.parametrize("target", NAMES)
def test_scripts_and_unit_parse(deployed: Deploy, target: str, tmp_path: Path) -> None:
    out = deployed(target).path
    texts = {
        name: (out / name).read_text(encoding="utf-8") for name in names_below(out) if "/" not in name and "whl" not in name
    }
    assert not [name for name, text in texts.items() if re.search(r"@[A-Z_]+@", text)]
    subprocess.run(["bash", "-n", out / "run.sh"], check=True)
    assert os.access(out / "run.sh", os.X_OK)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", out / "run.sh"], check=True)
    if shutil.which("systemd-analyze"):  # which looks for the command of the unit, in the home folder
        environment = {**os.environ, "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
        command = ["systemd-analyze", "verify", "--user", str(out / "bilevel.service")]
        check = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (check.returncode, check.stderr) == (0, "")
    unit = configparser.ConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(texts["bilevel.service"].replace("%h", "HOME"))
    assert unit["Service"]["ExecStart"] == "HOME/board/run.sh serve" and unit["Service"]["Restart"] == "on-failure"
    assert "MemoryMax" not in unit["Service"] and "User" not in unit["Service"]
    assert ("Dockerfile" in texts) == (target in BOARDS)


@pytest.mark.parametrize("target", BOARDS)
def test_a_board_is_told_what_is_missing_with_the_remedy(deployed: Deploy, target: str) -> None:
    written = deployed(target, build=False)
    assert [each.what for each in written.missing] == ["library of GPU kernels", "TensorRT engine"]
    readme = (written.path / "README.md").read_text(encoding="utf-8")
    for each in written.missing:
        assert each.why in readme and each.remedy in readme
    arch = {"orin-jp62": 87, "thor-jp7": 110}[target]
    assert f"--arch sm_{arch} --target aarch64" in written.missing[0].remedy
    assert "Nothing on" in readme and "sudo" not in (written.path / "bilevel.service").read_text(encoding="utf-8")


def test_the_bundles_own_gpu_kernels_are_taken(deployed: Deploy, bundle: Path) -> None:
    library = trusted(fake_gpu_library(bundle / KERNELS))
    written = deployed("orin-jp62", build=False)
    assert [each.what for each in written.missing] == ["TensorRT engine"]
    assert (written.path / "bundle" / KERNELS).read_bytes() == library.read_bytes()


def test_native_code_that_only_the_bundle_vouches_for_goes_nowhere(deployed: Deploy, bundle: Path) -> None:
    """The device would be told to trust it: neither found beside the files of the manifest, nor listed there."""
    library = fake_gpu_library(bundle / KERNELS, note="of a stranger")
    written = deployed("orin-jp62", build=False)
    assert "native code that this user neither built nor trusts" in written.missing[0].why
    assert not (written.path / "bundle" / "kernels").exists()
    edit_manifest(bundle, lambda manifest: manifest["files"].update({KERNELS: file_record(library)}))
    for target in ("orin-jp62", "linux-x86_64"):
        with pytest.raises(DeployError, match=f"neither built nor trusted it; trust it: bilevel kernels trust {library}"):
            deployed(target, f"listed-{target.replace('_', '-')}")
    trusted(library)
    written = deployed("orin-jp62", "chosen", build=False)
    assert (written.path / "bundle" / KERNELS).read_bytes() == library.read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "x86_64"}, "is for x86_64"),
        ({"architectures": {"90": "12.6"}}, "holds no machine code for sm_87"),
        ({"architectures": {"87": "13.0"}}, "machine code of CUDA 13.0, and the driver loads that of CUDA 12"),
        ({"library": "another"}, "is no kernel library"),
    ],
)
def test_gpu_kernels_of_another_machine_are_not_taken(
    deployed: Deploy, bundle: Path, changes: dict[str, Any], message: str
) -> None:
    library, target = fake_gpu_library(bundle / "kernels/aarch64/libbilevel_kernels.so", **changes), find_target("orin-jp62")
    assert target.board is not None
    assert message in gpu_problem(library, target, target.board)
    written = deployed("orin-jp62", build=False)
    assert message in written.missing[0].why and not (written.path / "bundle" / "kernels").exists()


def test_gpu_kernels_without_plugins_are_named(deployed: Deploy, bundle: Path) -> None:
    trusted(fake_gpu_library(bundle / KERNELS, tensorrt=None))
    assert [each.what for each in deployed("orin-jp62").missing] == ["TensorRT plugins", "TensorRT engine"]


def test_gpu_kernels_that_cannot_be_built_are_named(deployed: Deploy, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bool:
        raise KernelError("triton is not installed")

    monkeypatch.setattr(libraries, "build_gpu_library", fail)
    written = deployed("thor-jp7")
    assert written.missing[0].why == "triton is not installed" and written.starts


def test_a_library_that_asks_for_more_than_the_target_has_is_named() -> None:
    orin = find_target("orin-jp62")
    assert version_problem({"GLIBC": "2.35", "GLIBCXX": "3.4.30"}, orin) == ""
    assert version_problem({"GLIBC": "2.36"}, orin) == "it asks for GLIBC 2.36, Jetson Orin with JetPack 6.2 has 2.35"
    assert "GLIBCXX 3.4.31" in version_problem({"GLIBCXX": "3.4.31"}, orin)
    assert version_problem({"GLIBC": "2.4"}, orin) == ""


def test_cpu_kernels_that_cannot_be_compiled_leave_the_portable_bodies(
    deployed: Deploy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Path:
        raise KernelError("no compiler")

    monkeypatch.setattr(libraries, "build_cpu_library", fail)
    monkeypatch.setattr(libraries, "installed_cpu_library", lambda: None)
    written = deployed("linux-aarch64")
    assert [each.what for each in written.missing] == ["CPU kernels"] and written.starts
    assert "portable bodies" in written.missing[0].why and "g++-aarch64-linux-gnu" in written.missing[0].remedy
    assert [path.name for path in written.path.glob("*.whl")] == ["bilevel-0.1.0-py3-none-any.whl"]
    assert written.manifest["cpu_library"] is None


def test_only_for_another_machine_it_is_compiled(deployed: Deploy, without_compilers: list[str]) -> None:
    other = {"x86_64": "aarch64", "aarch64": "x86_64"}[platform.machine()]
    deployed(f"linux-{platform.machine()}", "own")
    assert without_compilers == []
    deployed(f"linux-{other}", "other")
    assert without_compilers == [other]


def change_manifest(bundle: Path, **changes: Any) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    (bundle / MANIFEST).write_text(json.dumps({**manifest, **changes}), encoding="utf-8")


def test_bf16_starts_on_no_cpu(deployed: Deploy, bundle: Path) -> None:
    change_manifest(bundle, precision="bfloat16")
    written = deployed("linux-x86_64")
    assert not written.starts and written.manifest["starts_on_cpu"] is False
    assert [each.what for each in written.missing if each.stops] == ["a start on the CPU"]


def test_integer_weights_leave_the_gpu_out(deployed: Deploy, bundle: Path) -> None:
    fake_gpu_library(bundle / "kernels/aarch64/libbilevel_kernels.so")
    sizes = {"bits": 8, "block": 32, "activations": "fp32", "quantised": {}, "experts": 0, "kept_fp32": {}}
    change_manifest(bundle, weights={"format": "int8", **sizes})
    written = deployed("orin-jp62")
    assert [each.what for each in written.missing] == ["the GPU"] and written.starts
    assert not (written.path / "bundle" / "kernels").exists()
    assert "builds TensorRT's engine" not in (written.path / "README.md").read_text(encoding="utf-8")


def test_the_bundle_is_linked_where_the_file_system_can(
    deployed: Deploy, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = deployed("linux-x86_64", "linked").path / "bundle"
    assert all((first / name).samefile(bundle / name) for name in load_bundle(bundle).files)
    assert not (first / MANIFEST).samefile(bundle / MANIFEST)  # bilevel check writes into it

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(folder.os, "link", refuse)
    second = deployed("linux-x86_64", "copied").path / "bundle"
    assert load_bundle(second) and not (second / "model.onnx").samefile(bundle / "model.onnx")


def test_an_archive_holds_the_folder_and_is_the_same_each_time(deployed: Deploy, tmp_path: Path) -> None:
    tree = deployed("linux-aarch64").path
    first, second = deployed("linux-aarch64", "board.tar.gz").path, tmp_path / "again"
    second.mkdir()
    again = deployed("linux-aarch64", "again/board.tar.gz").path
    assert first.read_bytes()[10:] == again.read_bytes()[10:]  # gzip's header has the time
    with tarfile.open(first) as archive:
        members = {member.name: member for member in archive.getmembers() if not member.isdir()}
    assert sorted(members) == [f"board/{name}" for name in names_below(tree)]
    assert all(member.isfile() and (member.uid, member.uname) == (0, "") for member in members.values())
    assert members["board/run.sh"].mode & 0o111


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("my board", "must consist of a-z"),
        ("Board", "must consist of a-z"),
        ("board.tar.zst", "end the name in .tar.gz"),
        ("bundle/board", "lies in"),
        ("taken", "exists; choose another name or replace it with --force"),
    ],
)
def test_a_place_that_does_not_do_is_refused(deployed: Deploy, tmp_path: Path, out: str, message: str) -> None:
    (tmp_path / "taken").mkdir()
    before = names_below(tmp_path)
    with pytest.raises(DeployError, match=re.escape(message)):
        deployed("linux-x86_64", out)
    assert names_below(tmp_path) == before


def test_force_replaces_only_what_deploy_wrote(deployed: Deploy, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    with pytest.raises(DeployError, match="was not written by bilevel deploy"):
        deployed("linux-x86_64", "photos", force=True)
    assert (tmp_path / "photos" / "cat.png").exists()
    deployed("linux-x86_64")
    assert deployed("linux-aarch64", force=True).manifest["target"] == "linux-aarch64"


@pytest.mark.parametrize(
    ("name", "python", "message"),
    [
        ("jetson", None, "--target 'jetson' is not known; take one of orin-jp62"),
        ("orin-jp62", "3.12", "--python 3.12 is not what Jetson Orin with JetPack 6.2 has"),
        ("linux-aarch64", "3.9", "--python 3.9 is not supported"),
    ],
)
def test_unknown_targets_are_refused(name: str, python: str | None, message: str) -> None:
    with pytest.raises(DeployError, match=re.escape(message)):
        find_target(name, python)


@pytest.mark.parametrize("damage", ["changed", "missing"])
@pytest.mark.parametrize("out", ["board", "board.tar.gz"])
def test_a_damaged_bundle_is_refused_and_what_was_there_stays(
    deployed: Deploy, bundle: Path, tmp_path: Path, damage: str, out: str
) -> None:
    deployed("linux-x86_64", out)
    path = bundle / "tokenizer.json"
    content = path.read_bytes()
    path.unlink()
    if damage == "changed":
        path.write_bytes(content[:-1] + b" ")
    before = names_below(tmp_path)
    with pytest.raises(BundleError, match="tokenizer.json (differs from the SHA-256|is missing)"):
        deployed("linux-x86_64", out, force=True)
    assert names_below(tmp_path) == before


@pytest.mark.parametrize("out", ["board", "board.tar.gz"])
@pytest.mark.parametrize(
    ("problem", "expected"),
    [(OSError(errno.ENOSPC, "No space left on device"), DeployError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_an_interrupted_write_leaves_nothing(
    deployed: Deploy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    out: str,
    problem: BaseException,
    expected: type[BaseException],
) -> None:
    deployed("linux-x86_64", out)
    before = {name: (tmp_path / name).stat().st_ino for name in names_below(tmp_path)}

    def interrupt(*_: object) -> None:
        raise problem

    monkeypatch.setattr(folder, "write_texts", interrupt)
    with pytest.raises(expected) as caught:
        deployed("linux-x86_64", out, force=True)
    assert not isinstance(caught.value, BilevelError) or "\n" not in str(caught.value)
    assert {name: (tmp_path / name).stat().st_ino for name in names_below(tmp_path)} == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
