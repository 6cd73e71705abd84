"""``make emulated``: a deployment for ARM, written here, installed and asked for text in an emulator, which is no ARM machine.

Debian's packages for arm64 become a folder (mmdebstrap), which proot makes the root, giving every program to qemu-user: no
rights of root are needed. ``run.sh`` of it installs from its own wheels, without a network, and its greedy text has to
be that of this machine. Needs mmdebstrap, proot, qemu-user, g++-aarch64-linux-gnu and a network; about ten minutes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests import ROOT

WORK = ROOT / "build" / "emulated"
GUEST = WORK / "root"
SUITE, PYTHON = "bookworm", "3.11"  # a Debian and its Python
PACKAGES = "base-files,bash,coreutils,libstdc++6,python3,python3-venv"
TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "proot": "proot",
    "qemu-aarch64": "qemu-user",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
}
ASK = ("def read_lines(path):", "--max-tokens", "32", "--temperature", "0", "--threads", "1", "--json")
PROBE = """
from pathlib import Path
import platform
from bilevel.plugins.library.cpu import find_cpu_library, instruction_set
import numpy, onnxruntime, tokenizers, pydantic, llguidance
print(platform.machine(), "onnxruntime", onnxruntime.__version__, "kernels", instruction_set(find_cpu_library()))
"""


def run(*command: str | Path) -> str:
    """Standard output of a command that has to succeed."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{result.stdout}\n{result.stderr}\nemulated: {' '.join(map(str, command))} ended with {result.returncode}")
    return result.stdout


def emulated(*command: str) -> str:
    """As ``run``, in the emulator and in the deployment's folder."""
    environment = ("/usr/bin/env", "-i", "PATH=/usr/bin:/bin", "HOME=/home", "OMP_NUM_THREADS=1")
    # Not /sys, which describes this machine's processor: what reads it there dies.
    bindings = ("-b", "/proc", "-b", "/dev")
    return run("proot", "-q", "qemu-aarch64", "-r", GUEST, *bindings, "-w", "/home/board", *environment, *command)


def text_of(output: str) -> str:
    """The completion in what ``bilevel run --json`` printed."""
    return str(json.loads(output)["completions"][0]["text"])


def main(bundle: Path) -> None:
    """Write, install, ask."""
    if missing := [package for tool, package in TOOLS.items() if shutil.which(tool) is None]:
        sys.exit(f"emulated: apt install {' '.join(missing)}")
    if WORK.exists():
        shutil.rmtree(WORK)
    WORK.mkdir(parents=True)
    run("mmdebstrap", "--arch=arm64", "--variant=extract", f"--include={PACKAGES}", SUITE, GUEST)
    bilevel = (sys.executable, "-m", "bilevel.runtime.cli.main")
    board = GUEST / "home" / "board"
    options = ("--target", "linux-aarch64", "--python", PYTHON, "--with-wheels")
    print(run(*bilevel, "deploy", bundle, board, *options), flush=True)
    doctor = emulated("./run.sh", "install")
    print(next(line.strip() for line in doctor.splitlines() if "ONNX Runtime on the CPU" in line), flush=True)
    print(emulated(".venv/bin/python", "-m", "pip", "check", "--disable-pip-version-check").strip())
    print(emulated(".venv/bin/python", "-c", PROBE).strip(), flush=True)
    here, there = text_of(run(*bilevel, "run", bundle, *ASK)), text_of(emulated("./run.sh", "run", *ASK))
    if here != there:
        sys.exit(f"emulated: the text differs: here {here!r}, in the emulator {there!r}")
    print(f"emulated: 32 tokens of greedy text as on this machine: {there.strip().splitlines()[0]!r}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
