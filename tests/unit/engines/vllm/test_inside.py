"""Layers run by themselves: what they are called with, and what is said where they do not run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steer.engines.vllm.inside.alone import LayersAlone, ReachedError
from steer.engines.vllm.inside.carried import BlockStates
from steer.engines.vllm.inside.layers import AttentionLayers, LayerCall
from steer.engines.vllm.inside.queries import queries_and_keys
from steer.engines.vllm.inside.weights import AttentionForm
from steer.engines.vllm.taps import ops
from steer.engines.vllm.taps.arguments import BEFORE, STREAM, Argument
from steer.engines.vllm.taps.layer_streams import FusedAdd
from steer.engines.vllm.taps.streams import TRIAL_TOKENS
from steer.engines.vllm.taps.taps import EagerTap, LayerTaps
from steer.errors import EngineError, Unsupported
from steer.model import HookPoint, ModelInfo

WIDTH, MOST = 6, 4
MODEL = ModelInfo("m", "M", 2, WIDTH, 10, 8, "float32", ("resid_pre", "resid_post"))


class Layer(nn.Module):
    """Doubles the sum of its halves, and notes what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> Any:
        self.seen.append((positions, hidden_states, residual))
        whole = hidden_states if residual is None else hidden_states + residual
        return 2 * whole, torch.zeros_like(whole)


def alone(layer: nn.Module, positions: Tensor, number: int = 1) -> LayersAlone:
    """`layer` is the only one of this worker, called in a trial with `positions`."""
    stream = torch.randn(TRIAL_TOKENS, WIDTH)
    args = (positions, stream, torch.randn(TRIAL_TOKENS, WIDTH) if number else None)
    halves = Argument(layer, STREAM), Argument(layer, BEFORE)
    calls = {number: LayerCall(layer, args, {}, *halves)}
    said: list[int] = []
    made = LayersAlone(
        calls, AttentionLayers({}, frozenset({number})), nullcontext, said.append, MOST
    )
    FusedAdd(None).install(layer, LayerTaps(None, EagerTap(3), EagerTap(2 * number + 2)))
    return made


def blocks(layers: LayersAlone, **fields: Any) -> BlockStates:
    return BlockStates(layers, {}, MODEL, lambda _: nullcontext(), **fields)


ENDS = HookPoint(1, "resid_pre"), HookPoint(1, "resid_post")


@pytest.mark.parametrize("rows", [(), (3,), (4,)], ids=["text", "images", "images and time"])
def test_a_layer_is_called_with_as_many_positions_as_states(rows: tuple[int, ...]) -> None:
    """Rotary positions of images have three rows or four; all tokens are the first."""
    layer = Layer()
    made = alone(layer, torch.arange(TRIAL_TOKENS).expand(*rows, TRIAL_TOKENS))
    states = torch.randn(7, WIDTH)
    kept = states.clone()
    torch.testing.assert_close(blocks(made)(*ENDS, states), 2 * states)
    assert torch.equal(states, kept)
    for (positions, hidden, residual), count in zip(layer.seen, (MOST, 3), strict=True):
        assert positions.shape == (*rows, count)
        assert not positions.any()
        assert hidden.shape == (count, WIDTH)
        assert residual is not None
        assert not residual.any()
    assert made.without_adapters.__self__ == [MOST, 3]  # type: ignore[attr-defined]
    assert ops.running is None


def test_the_first_layer_is_given_no_residual() -> None:
    layer = Layer()
    made = alone(layer, torch.arange(TRIAL_TOKENS), 0)
    ends = HookPoint(0, "resid_pre"), HookPoint(0, "resid_post")
    states = torch.randn(2, WIDTH)
    torch.testing.assert_close(blocks(made)(*ends, states), 2 * states)
    assert layer.seen[0][2] is None


def test_a_layer_of_another_worker_is_not_told() -> None:
    made = alone(Layer(), torch.arange(TRIAL_TOKENS))
    ends = HookPoint(0, "resid_pre"), HookPoint(0, "resid_post")
    assert blocks(made)(*ends, torch.zeros(1, WIDTH)) is None
    assert queries_and_keys(made, 0, torch.zeros(1, WIDTH)) is None


def refusal(ask: Callable[[], Any]) -> Unsupported:
    with pytest.raises(Unsupported) as caught:
        ask()
    assert ops.running is None
    return caught.value


def test_experts_are_not_run_without_the_engines_that_share_them() -> None:
    """What lies before them is told."""
    layer = Layer()
    made = blocks(alone(layer, torch.arange(TRIAL_TOKENS)), experts_apart=True)
    states = torch.zeros(1, WIDTH)
    error = refusal(lambda: made(*ENDS, states))
    assert error.code == "cannot_carry"
    assert "which all data-parallel engines run together" in error.message
    assert not layer.seen
    with pytest.raises(EngineError, match="ended without"):  # it ran: this layer has no such tap
        made(ENDS[0], HookPoint(1, "mlp_in"), states)


def test_a_layer_that_fails_by_itself_is_named() -> None:
    layer = Layer()
    made = alone(layer, torch.arange(TRIAL_TOKENS))

    def fail(*_: Any) -> Any:
        raise KeyError("attn_metadata")

    layer.forward = fail  # type: ignore[method-assign]
    error = refusal(lambda: blocks(made)(*ENDS, torch.zeros(1, WIDTH)))
    assert error.code == "cannot_carry"
    assert error.message == (
        "layer 1 does not run by itself on this vLLM (KeyError('attn_metadata')), so what it makes "
        "at 1.resid_post of 1.resid_pre is not told"
    )
    assert refusal(lambda: queries_and_keys(made, 1, torch.zeros(1, WIDTH))).code == "no_attention"


def test_a_layer_stops_where_it_is_left() -> None:
    layer = Layer()
    made = alone(layer, torch.arange(TRIAL_TOKENS))

    def leave(*_: Any) -> Any:
        raise ReachedError

    layer.forward = leave  # type: ignore[method-assign]
    made.run(1, torch.zeros(1, WIDTH), lambda _: None, what="nothing is", code="x")
    assert made.complete
    assert not replace(made, calls={}).complete


@pytest.mark.parametrize(
    "form",
    [
        AttentionForm(0.5),
        AttentionForm(0.5, cap=0.7, window=1),
        AttentionForm(0.5, sinks=torch.randn(4)),
        AttentionForm(0.5, cap=0.7, slopes=torch.rand(4), sinks=torch.randn(4)),
    ],
    ids=["plain", "capped", "sinks", "all"],
)
def test_the_weight_of_a_token_alone_is_that_of_a_prompt_of_one(form: AttentionForm) -> None:
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(5, 4, 3, generator=generator)
    key = torch.randn(5, 2, 3, generator=generator)
    each = [form.weights(query[n : n + 1], key[n : n + 1], [0])[:, 0, 0] for n in range(5)]
    torch.testing.assert_close(form.alone(query, key), torch.stack(each))
