"""``bilevel deploy BUNDLE OUT --target TARGET``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from bilevel.export.deploy.folder import Deployment, deploy
from bilevel.export.deploy.targets import NAMES, PYTHONS, Target, find_target

EPILOG = """\
OUT becomes one folder, or an archive where its name ends in .tar.gz, that is copied to the machine and started there:

  bilevel deploy my-bundle my-board --target orin-jp62        Jetson Orin, JetPack 6.2 (Python 3.10, CUDA 12.6, TensorRT 10.3)
  rsync -a my-board jetson:
  ssh jetson my-board/run.sh                                  installs into my-board/.venv, then serves

targets:
  orin-jp62        Jetson Orin with JetPack 6.2
  thor-jp7         Jetson Thor with JetPack 7 (Python 3.12, CUDA 13.0, TensorRT 10.13)
  linux-aarch64    any 64-bit ARM Linux with glibc 2.31 or newer: the CPU
  linux-x86_64     any x86-64 Linux with glibc 2.31 or newer: the CPU

In it: the bundle (hard links where the file system can), this package as a wheel with the CPU kernels for that machine (built
here where a cross compiler is: apt install g++-aarch64-linux-gnu), the GPU kernels (the bundle's, or built now), all packages
pinned in requirements.txt, run.sh, a systemd unit that needs no root, for Jetsons a container recipe, README.md with the steps
for the person at the device, and deploy.json with the SHA-256 of every file and what is missing and why. --with-wheels fetches
the packages too, so that the device needs no network.

No PyTorch is needed, and on a GPU or a Jetson nothing of it has run yet; README.md in the folder says what was tried.
Exit status: 0 when the device can start it on its CPU at least, 1 when it cannot, 2 for bad input.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Write everything that a machine needs to run a bundle: one folder or archive."
    parser.epilog = EPILOG
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder written by bilevel export")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder, or archive NAME.tar.gz, to write")
    parser.add_argument("--target", required=True, metavar="TARGET", help=f"one of {', '.join(NAMES)}")
    parser.add_argument(
        "--python", metavar="VERSION", help=f"linux-*: the device's, {PYTHONS[0]} to {PYTHONS[-1]} (default: as here)"
    )
    parser.add_argument(
        "--with-wheels", action="store_true", help="fetch the packages' wheels into OUT/wheels (asks pip's index)"
    )
    parser.add_argument(
        "--no-build", action="store_true", help="build no GPU kernels; take the bundle's, or say that they are missing"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--json", action="store_true", help="print deploy.json, with its place, instead of text")


def main(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    target, started = find_target(args.target, args.python), time.perf_counter()

    def tell(stage: str) -> None:
        if sys.stderr.isatty():
            print(stage, file=sys.stderr)

    written = deploy(
        args.bundle,
        args.out,
        target,
        force=args.force,
        wheels=args.with_wheels,
        build=not args.no_build,
        on_stage=tell,
    )
    seconds = time.perf_counter() - started
    if args.json:
        print(json.dumps({"path": str(written.path), "bytes": written.num_bytes, "seconds": seconds, **written.manifest}))
    else:
        print("\n".join(_lines(written, target, seconds)))
    return 0 if written.starts else 1


def _lines(written: Deployment, target: Target, seconds: float) -> list[str]:
    files = written.manifest["files"]
    assert isinstance(files, dict)
    lines = [
        f"wrote {written.path} ({written.num_bytes / 1e6:.1f} MB, {len(files) + 1} files) in {seconds:.1f} s",
        f"for {target.title}: {target.machine}, Python {target.python}",
    ]
    if missing := written.missing:
        lines.append("missing:")
        lines += [f"  {each.what}: {each.why}\n    {each.remedy}" for each in missing]
    else:
        lines.append("nothing is missing")
    lines.append("it starts on the CPU at least" if written.starts else "it does not start on the device's CPU")
    name = written.path.name.removesuffix(".tar.gz")
    unpack = f" && ssh DEVICE tar -xzf {written.path.name}" if written.path.is_file() else ""
    lines.append(
        f"next: rsync -a {written.path} DEVICE:{unpack} && ssh DEVICE {name}/run.sh    (README.md in it has the steps)"
    )
    return lines
