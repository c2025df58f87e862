"""What clamping a latent does: rates of an attribute in replies, with and without the clamp."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from steer_vectors.demo.recipe.data import asked_of
from steer_vectors.demo.recipe.training.corpus import Message
from steer_vectors.demo.recipe.world.attributes import Reader
from steer_vectors.demo.recipe.world.topics import TOPIC_NAMES
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

import steer
from steer.artefacts.sae import SAE

Chat = list[Message]
CLASS_OF = {
    "french": ("language", "fr"),
    "german": ("language", "de"),
    "formal": ("register", "formal"),
    "casual": ("register", "casual"),
    "positive": ("sentiment", "positive"),
    "negative": ("sentiment", "negative"),
    **{name: ("topic", name) for name in TOPIC_NAMES},
    "terse": ("length", "terse"),
    "verbose": ("length", "verbose"),
    "refusal": ("refusal", "refused"),
}
CAUSAL = tuple(CLASS_OF)


@dataclass(frozen=True)
class Rates:
    """Shares of replies whose first sentence has the attribute, and that are valid text."""

    attribute: float
    valid: float


@dataclass(frozen=True)
class Effect:
    """The best clamp found for an attribute on development prompts, measured on held-out ones."""

    attribute: str
    latent: int
    value: float
    before: Rates
    after: Rates

    @property
    def change(self) -> float:
        return self.after.attribute - self.before.attribute


_EFFECTS = TypeAdapter(list[Effect])


def effects_on(sae: SAE) -> list[Effect]:
    """The clamps that the SAE's card lists, as the recipe that labelled it measured them."""
    return _EFFECTS.validate_python(sae.card.provenance.get("clamps", []))


@dataclass(frozen=True)
class Bench:
    """Everything a clamp is tried on."""

    model: Any
    tok: PreTrainedTokenizerFast
    sae: SAE
    reader: Reader

    def rates(
        self, attribute: str, chats: Sequence[Chat], clamp: tuple[int, float] | None
    ) -> Rates:
        """Rates over greedy replies. The clamp holds at the last prompt token alone."""
        replies = self.replies(chats, clamp)
        readings = [self.reader.parse(reply) for reply in replies]
        return Rates(
            sum(one.first(attribute) for one in readings) / len(readings),
            sum(one.valid for one in readings) / len(readings),
        )

    def replies(self, chats: Sequence[Chat], clamp: tuple[int, float] | None) -> list[str]:
        inputs: Any = self.tok.apply_chat_template(
            list(chats),
            add_generation_prompt=True,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            return_dict=True,
        )
        length = inputs["input_ids"].shape[1]
        if clamp is None:
            out = self.model.generate(**inputs, max_new_tokens=40, do_sample=False)
        else:
            with steer.attach(self.model, clamp_spec(*clamp), saes={"sae": self.sae}):
                out = self.model.generate(**inputs, max_new_tokens=40, do_sample=False)
        return [
            str(text) for text in self.tok.batch_decode(out[:, length:], skip_special_tokens=True)
        ]


def clamp_spec(latent: int, value: float, *, sae: str = "sae") -> dict[str, Any]:
    """A clamp at the last prompt token."""
    return {
        "interventions": [
            {
                "kind": "clamp",
                "sae": sae,
                "features": [latent],
                "value": value,
                "mode": "at_least",
            }
        ],
        "where": {"phases": ["prompt"], "positions": [[-1, None]]},
    }


def prompts(folder: Path, attribute: str, *, held_out: bool, count: int) -> list[Chat]:
    """Prompts that do not ask for the attribute; for refusal, harmless requests."""
    if held_out:
        lines = [json.loads(line) for line in (folder / "heldout.jsonl").open(encoding="utf-8")]
        chats = [line["messages"] for line in lines if line["attribute"] == asked_of(attribute)]
    else:
        lines = [
            json.loads(line) for line in (folder / f"{attribute}.jsonl").open(encoding="utf-8")
        ]
        chats = [line["negative"] for line in lines]
    step = max(1, len(chats) // count)
    return chats[::step][:count]


def candidates(
    attribute: str, sae: SAE, aurocs: Mapping[Any, Tensor], difference: Tensor, count: int
) -> list[int]:
    """Latents worth trying: the best detectors, and those that write along the class difference."""
    detectors = aurocs[CLASS_OF[attribute], "prompt"].topk(count).indices.tolist()
    along = torch.cosine_similarity(sae.W_dec, difference[None], dim=-1)
    return list(dict.fromkeys([*detectors, *along.topk(count).indices.tolist()]))


def best_clamp(
    bench: Bench, attribute: str, latents: Sequence[int], values: Sequence[float], folder: Path
) -> Effect:
    """Tries every latent at every value on development prompts, measures the best on others.

    The best moves the attribute most among those that keep at least .8 of the replies valid.
    """
    few = prompts(folder, attribute, held_out=False, count=24)
    tried = []
    for latent in tqdm(latents, desc=attribute, unit="latent", mininterval=5):
        for value in values:
            rates = bench.rates(attribute, few, (latent, value))
            tried.append((rates.valid >= 0.8, rates.attribute, latent, value))
    _, _, latent, value = max(tried)
    many = prompts(folder, attribute, held_out=True, count=200)
    return Effect(
        attribute,
        latent,
        value,
        bench.rates(attribute, many, None),
        bench.rates(attribute, many, (latent, value)),
    )
