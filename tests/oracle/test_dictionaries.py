"""SAE files that dictionary_learning and sparsify wrote themselves, read as these read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from steer.artefacts.sae.base import SAE
from steer.registry.registry import Registry

pytestmark = pytest.mark.slow

LAYER, WIDTH = 1, 32
TRAINED = [
    "AutoEncoder",
    "AutoEncoder-April",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
]
CODERS = [
    "topk/layers.1",
    "groupmax/layers.1",
    "transcoder/layers.1.mlp",
    "skip_transcoder/layers.1.mlp",
]


@pytest.fixture(scope="module")
def states() -> torch.Tensor:
    return 2 * torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dictionaries")


@pytest.fixture(scope="module")
def theirs(run_peer: Any, states: torch.Tensor, folder: Path) -> dict[str, torch.Tensor]:
    """What the packages computed, and (in `folder`) the files that they wrote."""
    return run_peer(
        "dictionaries", "peer_dictionaries.py", {"x": states}, saves=str(folder), layer=LAYER
    )


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry.open(tmp_path_factory.mktemp("registry")) as opened:
        yield opened


def ours(registry: Registry, folder: Path, name: str) -> SAE:
    plain = name.split("/", maxsplit=1)[0].lower()
    registry.import_file(folder / name, name=plain, kind="sae")
    return registry.sae(plain)


@pytest.mark.parametrize("name", [*TRAINED, *CODERS])
def test_what_a_package_wrote_is_read_as_it_reads_it(
    name: str,
    theirs: dict[str, torch.Tensor],
    registry: Registry,
    folder: Path,
    states: torch.Tensor,
) -> None:
    sae = ours(registry, folder, name)
    assert (sae.layer, sae.d_in) == (LAYER, WIDTH)
    features = theirs[f"{name}.features"]
    assert 0 < int((features != 0).sum()) < features.numel()
    found = sae.encode(states)
    assert (found - features).abs().max() <= 1e-5 * max(1.0, float(features.abs().max()))
    decoded = theirs[f"{name}.decoded"]
    close = (sae.decode(found, states) - decoded).abs().max()
    assert close <= 1e-5 * max(1.0, float(decoded.abs().max()))
