#!/usr/bin/env bash
# Makes sure that PostgreSQL's server programs are on this machine, for tests/postgres:
#
#   deploy/postgres-for-tests.sh
#
# Does nothing where they are (in PATH, in POSTGRES_BIN, or where Debian puts them); otherwise
# installs Debian's package. The tests start a server of their own, on loopback, in a temporary
# folder; a cluster that the package makes is neither used nor started by this script.
set -euo pipefail

found() {
  [ -n "${POSTGRES_BIN:-}" ] && [ -x "$POSTGRES_BIN/initdb" ] && return
  command -v initdb >/dev/null && return
  compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null
}

if found; then exit; fi
if ! command -v apt-get >/dev/null; then
  echo "PostgreSQL's initdb is not here: install PostgreSQL, or set POSTGRES_BIN to its programs" >&2
  exit 1
fi
echo "installing Debian's postgresql package for the tests" >&2
run=()
if [ "$(id -u)" -ne 0 ]; then run=(sudo); fi
export DEBIAN_FRONTEND=noninteractive
"${run[@]}" apt-get update -qq
"${run[@]}" apt-get install -y -qq --no-install-recommends postgresql >/dev/null
found || { echo "the package postgresql has no initdb" >&2; exit 1; }
