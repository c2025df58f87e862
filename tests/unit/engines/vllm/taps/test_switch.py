"""Taps that are taken out while nobody needs them, on a layer of two modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from steer.engines.vllm.taps.inner_sites import show_input
from steer.engines.vllm.taps.layer_streams import EndsOnly
from steer.engines.vllm.taps.switch import TapSwitch
from steer.engines.vllm.taps.taps import LayerTaps


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(2, 2, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.part(hidden_states)


class Adding(nn.Module):
    """A tap that shows that it was reached."""

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return hidden + 1, residual


def tapped(layer: Layer) -> TapSwitch:
    def install() -> None:
        show_input(layer.part, Adding())
        EndsOnly().install(layer, LayerTaps(None, Adding(), Adding()))

    return TapSwitch({3: layer.modules()}, install)


def forwards(layer: Layer) -> list[Any]:
    return [vars(module).get("forward") for module in (layer, layer.part)]


def test_taps_are_out_until_they_are_turned_on_and_out_again_afterwards() -> None:
    layer, x = Layer(), torch.ones(3, 2)
    before, plain = forwards(layer), layer(x)
    switch = tapped(layer)
    for _ in range(2):
        assert forwards(layer) == before == [None, None]
        assert torch.equal(layer(x), plain)
        switch.turn({3})
        switch.turn({3})
        torch.testing.assert_close(layer(x), x + layer.part.weight @ torch.full((2,), 2.0) + 1)
        switch.turn(set())


def test_only_the_layers_that_are_needed_have_taps() -> None:
    layers = {n: Layer() for n in range(3)}

    def install() -> None:
        for layer in layers.values():
            show_input(layer.part, Adding())

    switch = TapSwitch({n: layer.modules() for n, layer in layers.items()}, install)
    for needed in ({1}, {1, 2}, {0, 2}, set()):
        switch.turn(needed)
        assert {n for n, layer in layers.items() if "forward" in vars(layer.part)} == needed


def wrapped(inner: Callable[..., Any]) -> Callable[..., Any]:
    def outer(*args: Any, **named: Any) -> Any:
        return inner(*args, **named)

    return outer


def test_a_forward_of_somebody_elses_comes_back() -> None:
    layer = Layer()
    layer.part.forward = mine = wrapped(layer.part.forward)  # type: ignore[method-assign]
    switch = tapped(layer)
    assert forwards(layer) == [None, mine]
    switch.turn({3})
    switch.turn(set())
    assert forwards(layer) == [None, mine]


def test_what_somebody_wraps_around_a_tap_stays() -> None:
    layer = Layer()
    switch = tapped(layer)
    switch.turn({3})
    layer.forward = mine = wrapped(layer.forward)  # type: ignore[method-assign]
    switch.turn(set())
    assert forwards(layer) == [mine, None]
    switch.turn({3})
    assert forwards(layer)[0] is mine
    assert forwards(layer)[1] is not None
