"""Linear-AcT: what the line through sorted samples is, and that layers are fitted in turn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steer.artefacts.affine import AffineMap, Channels
from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest
from steer.engines.plans import plans_of
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit.data.pairs import Pair, PairSet
from steer.fit.methods.linear.act import channel_map, fit_act
from steer.model import HookPoint
from steer.spec import parse_spec


def samples(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(80, 6, generator=generator).double()
    b = 2 * torch.randn(80, 6, generator=generator).double().abs() - 1
    return a, b


def applied(one: Channels, x: Tensor) -> Tensor:
    return one.scale * x + one.shift


def test_it_is_the_least_squares_line_through_the_sorted_samples() -> None:
    a, b = samples(0)
    found = channel_map(a, b, "linear", support=True)
    for channel in range(6):
        slope, offset = np.polyfit(
            np.sort(a[:, channel].numpy()), np.sort(b[:, channel].numpy()), 1
        )
        assert float(found.scale[channel]) == pytest.approx(slope, rel=1e-9)
        assert float(found.shift[channel]) == pytest.approx(offset, rel=1e-9, abs=1e-12)
    assert found.lower is not None
    assert found.upper is not None
    assert torch.equal(found.lower, a.min(0).values)
    assert torch.equal(found.upper, a.max(0).values)


def test_it_moves_the_mean_and_of_two_lines_apart_the_whole_sample() -> None:
    a, b = samples(1)
    torch.testing.assert_close(
        applied(channel_map(a, b, "linear", support=False), a).mean(0), b.mean(0)
    )
    turned = a[torch.randperm(80, generator=torch.Generator().manual_seed(2))] * 3 - 1
    torch.testing.assert_close(
        applied(channel_map(a, turned, "linear", support=False), a).sort(0).values,
        turned.sort(0).values,
    )
    mean = channel_map(a, b, "mean", support=True)
    torch.testing.assert_close(mean.shift, b.mean(0) - a.mean(0))
    assert bool((mean.scale == 1).all())


def test_a_channel_that_does_not_vary_is_moved_by_the_means() -> None:
    a, b = samples(0)
    a[:, 2] = 5.0
    found = channel_map(a, b, "linear", support=False)
    assert float(found.scale[2]) == 1.0
    assert float(5.0 + found.shift[2]) == pytest.approx(float(b[:, 2].mean()))


PAIRS = PairSet.of([Pair(f"sun {n} up", f"a day {n}") for n in range(8)])


def means(engine: TransformersEngine, side: str, artefact: Any, layer: int) -> Tensor:
    """The mean of the prompts' mean states, as fits read them, under `artefact`."""
    plan = None
    if artefact is not None:
        linear = isinstance(artefact, AffineMap)
        library = MemoryLibrary(**{"maps" if linear else "vectors": {"m": artefact}})
        item = {"kind": "affine", "map": "m"} if linear else {"kind": "add", "vector": "m"}
        plan = plans_of(engine, library).plan(parse_spec({"interventions": [item]}))
    prompts = [engine.tokenizer.encode(getattr(one, side)) for one in PAIRS.items]
    point = HookPoint(layer)
    found = engine.capture(CaptureRequest(prompts, (point,), plans=[plan] * len(prompts)))
    return torch.stack([one.states[point][1:].mean(0) for one in found]).mean(0)


@pytest.mark.parametrize("transport", ["linear", "mean"])
def test_with_all_layers_on_the_last_ones_mean_is_the_positive_prompts(
    lively: TransformersEngine, transport: Any
) -> None:
    """Only because every layer was fitted with those before it on."""
    done: list[int] = []
    options: dict[str, Any] = {"transport": transport, "support": False}
    found = fit_act(lively, PAIRS, name="m", layers=[0, 1, 2], progress=done.append, **options)
    assert isinstance(found, AffineMap if transport == "linear" else ControlVector)
    assert found.card.layers == (0, 1, 2)
    assert sum(done) == 3 * len(PAIRS)
    wanted = means(lively, "positive", None, 2)
    torch.testing.assert_close(means(lively, "negative", found, 2), wanted, rtol=0, atol=1e-3)
    apart = [fit_act(lively, PAIRS, name="m", layers=[n], **options) for n in (0, 1, 2)]
    if transport == "mean":
        together: Any = ControlVector.of({n: one[n] for n, one in enumerate(apart)})  # type: ignore[index]
        missed = (means(lively, "negative", together, 2) - wanted).norm()
        assert float(missed) > 0.1


def test_the_card_and_what_is_refused(engine: TransformersEngine) -> None:
    found = fit_act(engine, PAIRS, name="m", layers=[1])
    assert found.card.provenance["method"] == "linear-act"
    assert found.card.provenance["support"] is True
    assert isinstance(found, AffineMap)
    assert AffineMap.from_bytes(found.to_bytes(), name="m").sha256 == found.sha256
    with pytest.raises(SteerError) as caught:
        fit_act(engine, PairSet.of(PAIRS.items[:1]), name="m", layers=[1])
    assert caught.value.code == "no_pairs"
    same = PairSet.of([Pair("a", "a"), Pair("b", "b")])
    with pytest.raises(SteerError) as caught:
        fit_act(engine, same, name="m", layers=[1], transport="mean")
    assert caught.value.code == "no_difference"
