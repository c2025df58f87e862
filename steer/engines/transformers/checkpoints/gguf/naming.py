"""What a model in a GGUF file is called."""

from __future__ import annotations

import re

_NUMBERS = r"(?:I?Q\d+(?:_[0-9A-Z]+)*|TQ\d_\d|MXFP4(?:_MOE)?|NVFP4|F16|F32|BF16|FP16|FP32|FP8)"
_NOISE = re.compile(
    rf"[-._ ](?:(?:UD|i1|imat|imatrix)[-._])?{_NUMBERS}$|[-._ ]GGUF$", re.IGNORECASE
)


def name_of(stem: str) -> str:
    """The model's name in that of its file: `Qwen3-0.6B` of `Qwen3-0.6B-UD-Q4_K_XL`.

    Files are named for their model and how they are quantised. Without the second, the name is that
    of the checkpoint which the file was made from, so that vectors fitted on either are known to be
    for the same model.
    """
    name = stem
    while (shorter := _NOISE.sub("", name)) != name and shorter:
        name = shorter
    return name
