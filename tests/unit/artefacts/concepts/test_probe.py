"""Probes as files: what they hold is checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from artefacts import random_probe
from safetensors.torch import load

from steer.artefacts.concepts.network import CodeNetwork
from steer.artefacts.control_vector import Card, canonical_bytes
from steer.errors import SteerError
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions

GOOD = random_probe(3, 2, 4)


def lying(change: Callable[[dict[str, torch.Tensor]], object]) -> bytes:
    tensors = load(GOOD.to_bytes())
    change(tensors)
    return canonical_bytes(tensors, GOOD.card)


def card(**fields: object) -> bytes:
    return canonical_bytes(load(GOOD.to_bytes()), GOOD.card.model_copy(update=fields))


BAD: dict[str, bytes] = {
    "one too few": lying(lambda held: held.pop("probe.scale")),
    "one too many": lying(lambda held: held.update(more=torch.ones(1))),
    "another shape": lying(lambda held: held.update({"probe.hidden_bias": torch.ones(9)})),
    "not finite": lying(lambda held: held["probe.code_bias"].fill_(torch.nan)),
    "a scale of 0": lying(lambda held: held["probe.scale"].zero_()),
    "another width": card(width=8),
    "another site": card(site="mlp_out"),
    "no form": card(probe=None),
    "other dimensions": card(probe=GOOD.form.model_copy(update={"dimensions": 512})),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_lies_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(BAD[name])
    with pytest.raises(SteerError):
        read_artefact(tmp_path / "file", ImportOptions(), scratch=None, unpacked_limit=0)


def test_a_file_that_does_not(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(GOOD.to_bytes())
    read = read_artefact(tmp_path / "file", ImportOptions(), scratch=None, unpacked_limit=0)
    assert read.sha256 == GOOD.sha256


def test_other_cards_are_written_as_before() -> None:
    assert "probe" not in Card(width=1, layers=(0,)).model_dump(mode="json")
    assert "depth" not in Card(width=1, layers=(0,)).model_dump(mode="json")


def test_the_network_is_what_torch_computes() -> None:
    """Against the same weights in modules, in float64."""
    network: CodeNetwork = GOOD.network
    inputs = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    hidden, out = torch.nn.Linear(16, 8).double(), torch.nn.Linear(8, 256).double()
    for module, name in ((hidden, "hidden"), (out, "code")):
        module.weight.data = getattr(network, f"{name}_weight").double()
        module.bias.data = getattr(network, f"{name}_bias").double()
    whole = torch.nn.Sequential(hidden, torch.nn.GELU(), out)
    values = whole((inputs.double() - network.mean.double()) / network.scale.double())
    clear = values.abs() > 1e-4
    assert float(clear.double().mean()) > 0.99
    assert torch.equal(network.code(inputs)[clear].double(), values.sign()[clear])


def test_a_probe_reads_together_what_its_layers_say() -> None:
    states = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(2))
    # As many clusters as layers: the sum of both.
    assert torch.equal(GOOD.code(states), GOOD.network.code(states.double().sum(1).float()))
    assert GOOD.codebook.dimensions == 256
