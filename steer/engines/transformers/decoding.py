"""The proof that a form of the running batch generates what `generate` does.

Two sequences of unlike length are given the tokens that `generate` chose for each alone; they run
once side by side and once the one joining while the other is decoded. Every logits row must be the
one that `generate` saw: so the cache, positions, padding and parted prompts are right for this
model, or this form is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from steer.engines.base import GenerationRequest, SamplingParams
from steer.engines.listeners import Item
from steer.engines.proof import follow
from steer.engines.transformers.hooks import HookedModel
from steer.engines.transformers.sampling import Sampler
from steer.engines.transformers.sequences import Batch, BatchSequence
from steer.engines.transformers.structure.decoder import unsupported
from steer.errors import SteerError

_PROMPTS = ((1, 2, 3, 4), (5, 6, 7, 8, 9, 10, 11))
_TOKENS = 4


@dataclass(frozen=True)
class Generated:
    """What `generate` made of one prompt alone: greedy tokens, and float32 logits of each."""

    prompt: tuple[int, ...]
    tokens: list[int]
    logits: list[Tensor]


@torch.inference_mode()
def generated_alone(hooked: HookedModel) -> list[Generated]:
    """What `generate` makes of each probe prompt. Raises `Unsupported` where it fails."""
    return [_generated(hooked, prompt) for prompt in _PROMPTS]


def _generated(hooked: HookedModel, prompt: tuple[int, ...]) -> Generated:
    model: Any = hooked.model
    # Nothing of the model's own generation settings: they concern how tokens are chosen.
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=_TOKENS,
        num_beams=1,
        num_return_sequences=1,
        eos_token_id=hooked.info.vocab_size,  # never chosen
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    ids = torch.tensor([prompt], device=hooked.device)
    try:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    except Exception as error:
        raise unsupported(
            hooked.info.architecture,
            f"its own generate fails on token ids ({type(error).__name__}: {error})",
        ) from error
    tokens = out.sequences[0, len(prompt) :].tolist()
    return Generated(prompt, tokens, [row[0].float() for row in out.logits])


@torch.inference_mode()
def difference(batch: Batch, wanted: Sequence[Generated]) -> str | None:
    """In what way `batch` computes other logits than `generate`; None where it does not."""
    first, second = wanted
    try:
        return _compare(batch, [[first, second]]) or _compare(batch, [[first], [second]])
    finally:
        batch.clear()
        batch.lend()


def _compare(batch: Batch, arrivals: Sequence[Sequence[Generated]]) -> str | None:
    """Lets each group of `arrivals` join a step after the one before, and compares all rows."""
    followers: list[_Follower] = []
    for group in arrivals:
        joining = []
        for one in group:
            follower = _Follower(one)
            sampler = follower.sampler(batch.hooked.device)
            request = GenerationRequest("proof", one.prompt, sampler.params)
            joining.append(BatchSequence(request, batch.take(request), sampler, _TOKENS))
            followers.append(follower)
        failed = _failure(batch.join(joining)) or _failure(batch.decode())
        if failed is not None:
            return failed
    while batch.sequences:
        failed = _failure(batch.decode())
        if failed is not None:
            return failed
    dtype = next(batch.hooked.model.parameters()).dtype
    return next(filter(None, (follower.difference(dtype) for follower in followers)), None)


def _failure(items: Sequence[tuple[BatchSequence, Item]]) -> str | None:
    """What a sequence ended with in place of a token; None where each has one."""
    return next((item.message for _, item in items if isinstance(item, SteerError)), None)


class _Follower(LogitsProcessor):
    """Leaves the tokens alone that `generate` chose, and keeps the logits they are chosen from."""

    def __init__(self, wanted: Generated) -> None:
        self._wanted, self._seen = wanted, list[Tensor]()

    def sampler(self, device: torch.device) -> Sampler:
        """What chooses by it."""
        params = SamplingParams(max_tokens=_TOKENS, temperature=0, ignore_eos=True)
        return Sampler(params, device, grammar=self)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        self._seen.append(scores[0].clone())
        forced = torch.full_like(scores, -torch.inf)
        forced[0, self._wanted.tokens[len(self._seen) - 1]] = 0
        return forced

    def difference(self, dtype: torch.dtype) -> str | None:
        """In what way its rows are not what `generate` computed; None where they are."""
        if follow(self._seen, self._wanted.logits, dtype):
            return None
        return f"other logits than its own generate after {len(self._wanted.prompt)} tokens"
