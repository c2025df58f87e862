"""What a steered model that sees should say, by hooks by hand on transformers' own.

One prompt alone, all of it fed again for every token, and each intervention done to each row that
the spec means, in float64. An image's parts are tokens like others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import demo_specs
import torch
from float64_reference import Float64Reference, chosen, f64
from PIL.Image import Image
from tiny_vision import IMAGE
from torch import Tensor, nn
from transformers import AutoProcessor

from steer.model import HookPoint
from steer.spec import SteeringSpec, parse_spec

_ARTEFACTS = Float64Reference(
    demo_specs.VECTORS, demo_specs.SAES, demo_specs.LOW_RANKS, demo_specs.MAPS
)


@dataclass(frozen=True)
class Said:
    """The prompt's tokens, greedy tokens after them with their log-probabilities, and which of all
    tokens that were fed are steered."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    steered: list[bool]


class SeeingOracle:
    """Specs are of edits at `resid_post` without gates."""

    def __init__(self, model: Any, folder: Path) -> None:
        self._model, self._processor = model, AutoProcessor.from_pretrained(folder)
        self.image: int = self._processor.image_token_id

    def say(
        self, text: str, images: Sequence[Image], spec: dict[str, Any] | None, *, new: int
    ) -> Said:
        more = {"images": list(images), "input_data_format": "channels_last"} if images else {}
        seen = dict(self._processor(text=text, **more, return_tensors="pt"))
        prompt = seen.pop("input_ids")[0].tolist()
        del seen["attention_mask"]
        tokens, logprobs = list(prompt), []
        parsed = None if spec is None else parse_spec(self._with_ids(spec))
        with self._steered(parsed, tokens, len(prompt)), torch.no_grad():
            for _ in range(new):
                logits = self._model(torch.tensor([tokens]), use_cache=False, **seen).logits
                scores = logits[0, -1].log_softmax(-1)
                tokens.append(int(scores.argmax()))
                logprobs.append(float(scores.max()))
        steered = [
            parsed is not None and _chosen(parsed, n, len(prompt), token)
            for n, token in enumerate(tokens[:-1])
        ]
        return Said(prompt, tokens[len(prompt) :], logprobs, steered)

    def _with_ids(self, spec: Any) -> Any:
        """The spec with the image's token as its id."""
        if isinstance(spec, dict):
            return {name: self._with_ids(one) for name, one in spec.items()}
        if isinstance(spec, list):
            return [self._with_ids(one) for one in spec]
        return self.image if spec == IMAGE else spec

    @contextmanager
    def _steered(self, spec: SteeringSpec | None, tokens: list[int], length: int) -> Iterator[None]:
        """`tokens` are those fed in each pass, of which `length` are prompt."""

        def edit(layer: int, _module: nn.Module, _args: Any, output: Any) -> Tensor:
            assert spec is not None
            rows = f64(output[0])
            for n, token in enumerate(tokens):
                at = HookPoint(layer), rows[n], n, length, token
                rows[n] = _ARTEFACTS.steer(spec, *at)
            return torch.from_numpy(rows)[None].to(output)

        layers = self._model.model.text_model.layers if spec is not None else ()
        hooks = [one.register_forward_hook(partial(edit, n)) for n, one in enumerate(layers)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _chosen(spec: SteeringSpec, position: int, length: int, token: int) -> bool:
    return any(chosen(spec, item, position, length, token) for item in spec.interventions)
