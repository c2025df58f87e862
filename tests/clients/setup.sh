#!/usr/bin/env bash
# Installs the clients that are run against the server (requirements.txt), in an environment of their
# own, .venvs/clients: Steer depends on none of them. May be run again; does nothing when all is in
# place.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$here/../../.venvs/clients
wanted=$(cat "$here/requirements.txt")

if [ "$(cat "$venv/.ready" 2>/dev/null)" = "$wanted" ]; then exit; fi
echo "clients: installing $(grep -vc '^#' "$here/requirements.txt") packages and what they need" >&2
rm -rf "$venv"
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install --quiet --quiet --disable-pip-version-check --no-compile \
  --requirement "$here/requirements.txt"
echo "$wanted" >"$venv/.ready"
