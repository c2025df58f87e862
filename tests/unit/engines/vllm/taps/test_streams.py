"""How the stream is found that a model's layers hand on, on small models made for the purpose.

Each has the signatures and the ways of vLLM's models; vLLM itself is not needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steer.engines.vllm.taps.decoder import find_decoder
from steer.engines.vllm.taps.layer_streams import ENDS
from steer.engines.vllm.taps.layouts import choose_stack, find_unembedding
from steer.engines.vllm.taps.ops import set_running
from steer.engines.vllm.taps.streams import Streams, read_streams
from steer.engines.vllm.taps.taps import DecoderStack, EagerTap, install, tap_of
from steer.errors import Unsupported
from steer.model import HookPoint

LAYERS, WIDTH = 3, 8
SHIFT = torch.linspace(-1, 1, WIDTH)


def norm(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()


class Norm(nn.Module):
    """As vLLM's: adds two halves, and normalises their sum. Its weight is one that autograd would
    follow, as those of `nn.LayerNorm` are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return norm(x) * self.weight
        return norm(x + residual) * self.weight, x + residual


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()
        self.mixer = nn.Linear(WIDTH, WIDTH)


class Halves(Layer):
    """Most of vLLM's: what was added last, and all before it."""

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> Any:
        if residual is None:
            residual, x = hidden_states, self.norm(hidden_states)
        else:
            x, residual = self.norm(hidden_states, residual)
        return self.mixer(x), residual


class Mixer(Halves):
    """Another class in the same stack, as hybrids have."""


class Whole(Layer):
    """Granite, Falcon-H1."""

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Any:
        return self.added(hidden_states)

    def added(self, stream: Tensor) -> Any:
        return stream + 0.5 * self.mixer(self.norm(stream))


class Stale(Whole):
    """Granite hybrid, Cohere: a residual that nobody reads."""

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Any = None) -> Any:
        return self.added(hidden_states), hidden_states


class NoSecond(Whole):
    """MiniCPM, Gemma 4."""

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Any = None) -> Any:
        return self.added(hidden_states), None


class Unsummed(Halves):
    """Halves one of which is scaled, or not yet summed over its group, when it is read."""

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> Any:
        half = None if residual is None else 0.9 * residual
        return super().forward(positions, hidden_states, half)


class Threes(Halves):
    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> Any:
        return (*super().forward(positions, hidden_states, residual), positions)


class Nameless(Layer):
    def forward(self, positions: Tensor, states: Tensor) -> Any:
        return states


class Decoder(nn.Module):
    """Runs its layers as vLLM's models do. `between` changes the stream on its way to the next
    layer, `rounds` is how often all layers run."""

    def __init__(
        self,
        *kinds: type[Layer],
        between: Callable[[Tensor], Tensor] = lambda x: x,
        rounds: int = 1,
        copies: int = 1,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kinds[n % len(kinds)]() for n in range(LAYERS))
        self.norm = Norm()
        self.between, self.rounds, self.copies = between, rounds, copies

    def forward(self, hidden: Tensor) -> Tensor:
        residual: Any = None
        hidden = hidden.repeat(self.copies, 1)
        for _ in range(self.rounds):
            for layer in self.layers:
                positions = torch.arange(len(hidden))
                hidden = self.between(hidden)
                named = {"residual": residual} if type(layer) is not Whole else {}
                output = layer(positions, hidden_states=hidden, **named)
                hidden, residual = output[:2] if isinstance(output, tuple) else (output, None)
        whole = isinstance(self.layers[0], Stale)
        final: Tensor = (
            self.norm(hidden) if whole or residual is None else self.norm(hidden, residual)[0]
        )
        return final[: len(final) // self.copies]


class Deepstack(Decoder):
    def forward(self, hidden: Tensor, deepstack_input_embeds: Any = None) -> Tensor:
        return super().forward(hidden)


class Model(nn.Module):
    def __init__(self, decoder: Decoder, scale: float = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.scale = decoder, scale
        self.head = nn.Linear(WIDTH, 5)
        for weight in self.parameters():
            nn.init.normal_(weight)

    @torch.inference_mode()
    def run(self, tokens: int) -> Tensor:
        made: Tensor = self.model(torch.zeros(tokens, WIDTH)) * self.scale
        return made

    @torch.inference_mode()
    def compute_logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden)
        return logits


def read(model: Model) -> tuple[DecoderStack, Streams]:
    decoder = find_decoder(model, LAYERS)
    streams = read_streams(decoder, model.run, width=WIDTH, largest=64, experts=False)
    return choose_stack(decoder, streams), streams


SERVED: dict[str, tuple[tuple[type[Layer], ...], bool]] = {
    "halves": ((Halves,), True),
    "hybrid": ((Halves, Mixer), True),
    "whole": ((Whole,), False),
    "stale": ((Stale,), False),
    "no second": ((NoSecond,), False),
}


@pytest.mark.parametrize("name", SERVED)
def test_halves_are_told_from_a_whole_stream(name: str) -> None:
    kinds, halves = SERVED[name]
    stack, streams = read(Model(Decoder(*kinds)))
    assert streams.halves is halves
    assert stack.layout.sites == ENDS


class _Shift:
    """A visitor that adds to the stream at one point, and keeps what it was."""

    def __init__(self, point: HookPoint) -> None:
        self.taps = frozenset({tap_of(point)})
        self.seen = torch.empty(0)

    def visit(self, tap: int, hidden: Tensor, residual: Tensor | None) -> None:
        self.seen = hidden + (0 if residual is None else residual)
        (hidden if residual is None else residual).add_(SHIFT)


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_the_tap_moves_the_stream_that_the_next_layer_reads(name: str, layer: int) -> None:
    """The same model with the shift written into its own code is the oracle."""
    model = Model(Decoder(*SERVED[name][0]))
    given: list[Tensor] = []
    seen = model.model.layers[layer].register_forward_hook(
        lambda _, __, output: given.append(_summed(output, halves=SERVED[name][1]))
    )
    moved = model.model.layers[layer].register_forward_hook(
        lambda _, __, output: (
            output + SHIFT if isinstance(output, Tensor) else (output[0] + SHIFT, output[1])
        )
    )
    wanted = model.run(4)
    for hook in (seen, moved):
        hook.remove()
    stack, _ = read(model)
    install(stack, EagerTap)
    visitor = _Shift(HookPoint(layer, "resid_post"))
    set_running(visitor)
    try:
        steered = model.run(4)
    finally:
        set_running(None)
    assert torch.allclose(steered, wanted, atol=1e-5)
    assert torch.allclose(visitor.seen, given[0], atol=1e-6)


def _summed(output: Any, *, halves: bool) -> Tensor:
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first + output[1] if halves else first.clone()


REFUSED: dict[str, tuple[Callable[[], Decoder], str]] = {
    "a half that counts otherwise": (lambda: Decoder(Unsummed), "neither the sum of the two"),
    "changed between layers": (
        lambda: Decoder(Halves, between=lambda x: 1.5 * x + 1),
        "layer 1, .*Halves, is not given what layer 0 returned",
    ),
    "run twice": (lambda: Decoder(Whole, rounds=2), "in the order .0, 1, 2, 0, 1, 2. and not"),
    "several streams": (lambda: Decoder(Whole, copies=4), "not one state of 8 numbers for each"),
    "three values": (lambda: Decoder(Threes), "returns .*, which is neither a stream nor a pair"),
    "another name": (lambda: Decoder(Nameless), "takes positions, states and not hidden_states"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_streams_are_refused_with_the_reason(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(Unsupported, match=reason) as refused:
        read(Model(make()))
    assert refused.value.code == "unsupported_architecture"


def test_a_pass_that_fails_is_told_as_what_it_is() -> None:
    model = Model(Decoder(Whole))
    model.model.layers[1].mixer = nn.Linear(WIDTH + 1, WIDTH)
    with pytest.raises(Unsupported, match=r"could not run it without a cache.*RuntimeError"):
        read(model)


def test_a_pass_that_fails_without_a_word_is_told_by_where_it_did() -> None:
    """As vLLM's collectives do that a device does not have."""

    class Gathers(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

    model = Model(Decoder(Whole))
    model.model.layers[1].mixer = Gathers()
    with pytest.raises(Unsupported, match=r"NotImplementedError in forward of test_streams.py\)"):
        read(model)


def test_the_model_is_as_it_was() -> None:
    model = Model(Decoder(Halves))
    before = model.run(4)
    read(model)
    assert torch.equal(model.run(4), before)


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("scale", [1, 0.25])
def test_the_last_state_unembeds_to_the_logits(name: str, scale: float) -> None:
    model = Model(Decoder(*SERVED[name][0]), scale)
    _, streams = read(model)
    unembed = find_unembedding(find_decoder(model, LAYERS), streams)
    last: list[Tensor] = []
    model.model.layers[-1].register_forward_hook(
        lambda _, __, output: last.append(_summed(output, halves=SERVED[name][1]))
    )
    made = model.run(4)
    assert unembed is not None
    logits = unembed(last[0])
    assert logits is not None
    assert torch.allclose(logits, model.compute_logits(made), atol=1e-5)


def test_an_ending_that_is_no_norm_is_refused_where_it_is_asked_for() -> None:
    model = Model(Decoder(Whole))
    run = model.run
    model.run = lambda tokens: torch.tanh(run(tokens))  # type: ignore[method-assign]
    _, streams = read(model)
    unembed = find_unembedding(find_decoder(model, LAYERS), streams)
    assert unembed is not None
    with pytest.raises(Unsupported, match="not one final norm"):
        unembed(torch.zeros(1, WIDTH))


def test_where_images_are_added_between_layers_the_ends_after_them_are_served() -> None:
    stack, _ = read(Model(Deepstack(Halves)))
    assert stack.layout.sites == ("resid_post",)


def test_the_text_model_of_several_parts_is_the_one_that_is_tapped() -> None:
    model = Model(Decoder(Halves))
    model.tower = Decoder(Whole)
    with pytest.raises(Unsupported, match="more than one list of 3 layers"):
        find_decoder(model, LAYERS)
    model.get_language_model = lambda: model.model  # type: ignore[assignment]
    assert find_decoder(model, LAYERS).owner is model.model


def test_a_model_without_such_a_list_is_refused() -> None:
    with pytest.raises(Unsupported, match="no list of 5 layers"):
        find_decoder(Model(Decoder(Halves)), 5)
