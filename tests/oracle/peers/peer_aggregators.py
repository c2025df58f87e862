"""steering-vectors: the direction each of its aggregators makes of paired states.

Runs in .venvs/peers.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import load_file, save_file
from steering_vectors import mean_aggregator, pca_aggregator


def main(folder: Path) -> None:
    given = load_file(folder / "inputs.safetensors")
    pair = given["positive"], given["negative"]
    out = {"diffmean": mean_aggregator()(*pair), "pca": pca_aggregator()(*pair)}
    save_file({name: t.contiguous() for name, t in out.items()}, folder / "outputs.safetensors")


main(Path(sys.argv[1]))
