#!/usr/bin/env bash
# Runs the bundle beside this script on @TITLE@.
set -euo pipefail

usage() {
  cat <<'END'
./run.sh                    install at the first start, then serve on http://127.0.0.1:8000
./run.sh serve --port 9000  the same with options of bilevel serve
./run.sh install            only install: compare every file with deploy.json, make .venv, say what runs here
@ENGINE_USAGE@./run.sh run "Once upon a time"
./run.sh doctor             any other command of bilevel: the bundle is put behind its name

PYTHON=/usr/bin/python@PYTHON@ ./run.sh chooses the Python that .venv is made of.
END
}

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
bundle=$here/bundle
venv=$here/.venv
wheel=@WHEEL@

fail() {
  printf 'run.sh: error: %s\n' "$1" >&2
  exit 2
}

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python@PYTHON@ python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (@PYTHON_TUPLE@))' 2>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  fail "this folder was written for Python @PYTHON@, which is not here; install it, or write the folder anew: bilevel deploy --help"
}

compare_files() {
  "$1" - "$here" <<'END' || fail "copy the folder anew"
import hashlib, json, pathlib, sys

folder = pathlib.Path(sys.argv[1])
manifest = json.loads((folder / "deploy.json").read_text(encoding="utf-8"))
for name, record in manifest["files"].items():
    digest = hashlib.sha256()
    try:
        with (folder / name).open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        sys.exit(f"{name}: {error.strerror}")
    if digest.hexdigest() != record["sha256"]:
        sys.exit(f"{name} differs from its SHA-256 in deploy.json")
END
}

# -I: neither this folder nor the environment may put other modules before those of .venv.
bilevel() {
  "$venv/bin/python" -I -m bilevel.runtime.cli.main "$@"
}

install() {
  local python state
  python=$(find_python)
  state=$(cksum < "$here/deploy.json")
  if [[ -f $venv/ready && $(< "$venv/ready") == "$state" ]]; then
    return
  fi
  compare_files "$python"
  [[ $(uname -m) == @MACHINE@ ]] || fail "this folder is for @MACHINE@, this machine is $(uname -m)"
  "$python" -m venv --clear @VENV_OPTIONS@"$venv" || fail "Python's module venv is missing; on Ubuntu and Debian: sudo apt install python@PYTHON@-venv"
  local source=()
  if [[ -d $here/wheels ]]; then
    source=(--no-index --find-links "$here/wheels")
  fi
  "$venv/bin/python" -I -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-deps ${source[@]+"${source[@]}"} \
    --only-binary=:all: --requirement "$here/requirements.txt" "$here/$wheel"
  if [[ -f $bundle/kernels/@MACHINE@/libbilevel_kernels.so ]]; then
    bilevel kernels trust "$bundle/kernels/@MACHINE@/libbilevel_kernels.so"
  fi
  printf '%s\n' "$state" > "$venv/ready"
  bilevel doctor "$bundle" || fail "nothing runs the bundle here; bilevel doctor says above what is in the way"
}

case ${1:-serve} in
  -h | --help) usage ;;
  install) install ;;
@ENGINE_CASE@  serve)
    shift "$(($# > 0 ? 1 : 0))"
    install
    exec "$venv/bin/python" -I -m bilevel.runtime.cli.main serve "$bundle" --backend @BACKEND@ --model-name @NAME@ "$@"
    ;;
  *)
    install
    exec "$venv/bin/python" -I -m bilevel.runtime.cli.main "$1" "$bundle" "${@:2}"
    ;;
esac
