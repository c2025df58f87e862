"""A read-out plan survives its file: the same readers, which read the same."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from artefacts import EVERYTHING as ABLE
from artefacts import shape_of
from readout_oracle import EVERYTHING, SEVERAL, reading_library

from steer.artefacts.lens import Lens
from steer.artefacts.library import MemoryLibrary
from steer.artefacts.sae.base import SAE
from steer.errors import FileFormatError
from steer.readouts.compiler import compile_readouts
from steer.readouts.file import dump_readouts, load_readouts
from steer.readouts.plan import ReadoutPlan
from steer.readouts.readers import Instruments, LensReader
from steer.readouts.spec import ReadoutSpec

WIDTH, LAYERS = 16, 3
LIBRARY = reading_library(WIDTH, LAYERS)


@dataclass(frozen=True)
class Registered:
    """A library's artefacts by hash."""

    library: MemoryLibrary

    def sae(self, sha256: str) -> SAE:
        return next(one for one in self.library.saes.values() if one.sha256 == sha256)

    def lens(self, sha256: str) -> Lens:
        return next(one for one in self.library.lenses.values() if one.sha256 == sha256)


def compiled(name: str) -> ReadoutPlan:
    spec = ReadoutSpec.model_validate({**SEVERAL[name], "tokens": "all"})
    return compile_readouts(spec, LIBRARY, shape_of(WIDTH, LAYERS), ABLE, None)


@pytest.mark.parametrize("name", SEVERAL)
def test_it_reads_the_same(name: str) -> None:
    plan = compiled(name)
    again = load_readouts(dump_readouts(plan), Registered(LIBRARY))
    assert (again.fields, again.tokens, again.width) == (plan.fields, "all", plan.width)
    assert [one.key for one in again.readers] == [one.key for one in plan.readers]
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    tools = Instruments(torch.device("cpu"))
    for one, other in zip(plan.readers, again.readers, strict=True):
        if isinstance(one, LensReader) and isinstance(other, LensReader):
            assert torch.equal(one.states(x, tools), other.states(x, tools))
        elif not isinstance(one, LensReader) and not isinstance(other, LensReader):
            assert torch.equal(one.read(x, x, tools), other.read(x, x, tools))


def test_the_same_plan_has_the_same_bytes() -> None:
    assert EVERYTHING
    assert dump_readouts(compiled("everything")) == dump_readouts(compiled("everything"))


@pytest.mark.parametrize("damage", [b"", b"x" * 64, dump_readouts(compiled("norms"))[:-9]])
def test_other_bytes_are_refused(damage: bytes) -> None:
    with pytest.raises(FileFormatError) as caught:
        load_readouts(damage, Registered(LIBRARY))
    assert caught.value.code == "invalid_plan"
