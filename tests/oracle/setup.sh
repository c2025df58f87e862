#!/usr/bin/env bash
# Installs the packages that Steer is compared with, each in an environment of its own under
# .venvs/: their requirements clash (numpy 1 and 2, transformers 4 and 5), and Steer depends on
# none of them. May be run again; does nothing when all is in place.
#
# torch and transformers are by far the largest part, and every peer runs on the same versions as
# Steer, so they are borrowed from the project's own environment through a .pth file. What a peer
# needs in another version is installed in its environment and found there first. Where the
# project's environment is missing, a base with torch and transformers alone is built.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
venvs=$root/.venvs
python=${PYTHON:-python3}
torch=${TORCH:-torch==2.13.0}
pip_options=(--quiet --quiet --disable-pip-version-check --no-compile)

say() { printf 'oracles: %s\n' "$*" >&2; }

base=$root/.venv
if ! "$base/bin/python" -c 'import torch, transformers' 2>/dev/null; then
  base=$venvs/base
  if [ ! -e "$base/.ready" ]; then
    say "installing torch and transformers"
    rm -rf "$base"
    "$python" -m venv "$base"
    "$base/bin/pip" install "${pip_options[@]}" "$torch"
    "$base/bin/pip" install "${pip_options[@]}" "transformers>=5.19,<5.24"
    touch "$base/.ready"
  fi
fi
shared=$("$base/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# environment NAME REQUIREMENTS [REQUIREMENTS_WITHOUT_DEPENDENCIES]
environment() {
  local name=$1 venv=$venvs/$1 requirements bare wanted
  read -ra requirements <<<"$2"
  read -ra bare <<<"${3:-}"
  wanted="$shared $2 ${3:-}"
  if [ "$(cat "$venv/.ready" 2>/dev/null)" = "$wanted" ]; then return; fi
  say "installing ${requirements[*]} ${bare[*]}"
  rm -rf "$venv"
  "$base/bin/python" -m venv "$venv"
  echo "$shared" >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
  "$venv/bin/pip" install "${pip_options[@]}" "${requirements[@]}"
  if [ "${#bare[@]}" -gt 0 ]; then
    "$venv/bin/pip" install "${pip_options[@]}" --no-deps "${bare[@]}"
  fi
  echo "$wanted" >"$venv/.ready"
}

# steering-vectors asks for transformers below 5, which its arithmetic does not need; tuned-lens for
# what its training needs.
environment peers "nnsight==0.8.1 scikit-learn>=1.4" "steering-vectors==0.12.2 tuned-lens==0.2.0"
environment repeng "repeng==0.4.0 numpy==1.26.*"
environment sae-lens "sae-lens==6.54.0"
# dictionary_learning asks for an nnsight below 0.4 and for what draws and reports; to train on states
# and to write files it needs the following, and any nnsight.
environment dictionaries \
  "nnsight==0.8.1 datasets einops natsort simple-parsing schedulefree zstandard wandb" \
  "dictionary-learning==0.1.0 eai-sparsify==1.3.3"

bash "$root/tests/oracle/llama_cpp.sh"
