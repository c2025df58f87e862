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
from tiny_vision import Family, replaced
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
    """Specs are of edits at `resid_post` without gates, and name images and their tokens as those
    of `tiny_vision` do, whatever the family."""

    def __init__(self, model: Any, folder: Path, family: Family) -> None:
        self.model, self._processor = model, AutoProcessor.from_pretrained(folder)
        self.image: int = self._processor.image_token_id
        self.family = family

    def say(
        self, text: str, images: Sequence[Image], spec: dict[str, Any] | None, *, new: int
    ) -> Said:
        more = {"images": list(images)} if images else {}
        text = self.family.worded(text)
        seen = dict(self._processor(text=text, **more, return_tensors="pt"))
        prompt = seen.pop("input_ids")[0].tolist()
        del seen["attention_mask"]
        # Which tokens are images, where the family asks to be told: none of what is generated.
        kinds = seen.pop("mm_token_type_ids", None)
        tokens, logprobs = list(prompt), []
        spec = replaced(self.family.spec(spec), self.family.token, self.image)
        parsed = None if spec is None else parse_spec(spec)
        with self._steered(parsed, tokens, len(prompt)), torch.no_grad():
            for made in range(new):
                if kinds is not None:
                    seen["mm_token_type_ids"] = nn.functional.pad(kinds, (0, made))
                logits = self.model(torch.tensor([tokens]), use_cache=False, **seen).logits
                scores = logits[0, -1].log_softmax(-1)
                tokens.append(int(scores.argmax()))
                logprobs.append(float(scores.max()))
        steered = [
            parsed is not None and _chosen(parsed, n, len(prompt), token)
            for n, token in enumerate(tokens[:-1])
        ]
        return Said(prompt, tokens[len(prompt) :], logprobs, steered)

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

        layers = self.model.get_decoder().layers if spec is not None else ()
        hooks = [one.register_forward_hook(partial(edit, n)) for n, one in enumerate(layers)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _chosen(spec: SteeringSpec, position: int, length: int, token: int) -> bool:
    return any(chosen(spec, item, position, length, token) for item in spec.interventions)
