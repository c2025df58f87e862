"""Patchscopes as they are run without a server: for each cell one run of the source and one
generation of the target (2401.06102, and the manner of its authors' code: hidden states that the
model hands out, and a hook that puts one of them in)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.inspection.readings import Tokens


class OneByOne:
    """Plain transformers in float32; `device` is the CPU."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForCausalLM  # noqa: PLC0415

        load: Any = AutoModelForCausalLM.from_pretrained
        self._model = load(folder, dtype=torch.float32).eval()
        self._blocks = self._model.model.layers

    @property
    def layers(self) -> int:
        return len(self._blocks)

    @torch.inference_mode()
    def say(
        self, source: Tokens, layer: int, target: Tokens, place: int, goal: int, tokens: int
    ) -> list[int]:
        """What the model says, greedily, after `target`, whose token at `place` has at the end of
        block `goal` the state of the last token of `source` at the end of block `layer`."""
        state = self._state(source, layer)

        def put_in(_block: object, _given: object, output: Any) -> None:
            states = cast(Tensor, output[0] if isinstance(output, tuple) else output)
            if states.shape[1] > 1 or len(target) == 1:  # the prompt, and no later token
                states[0, place] = state

        hook = self._blocks[goal].register_forward_hook(put_in)
        try:
            return self._continued(target, tokens)
        finally:
            hook.remove()

    def _state(self, source: Tokens, layer: int) -> Tensor:
        """The last state that is handed out is behind the final norm: that of the last block is
        taken by a hook."""
        seen: list[Tensor] = []

        def look(_block: object, _given: object, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        hook = self._blocks[-1].register_forward_hook(look)
        try:
            made = self._model(
                torch.tensor([source]), output_hidden_states=True, use_cache=False
            ).hidden_states
        finally:
            hook.remove()
        states = (*made[1 : self.layers], seen[0])
        found: Tensor = states[layer][0, -1].clone()
        return found

    def _continued(self, target: Tokens, tokens: int) -> list[int]:
        ids = torch.tensor([target])
        made: Sequence[int] = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )[0, len(target) :].tolist()
        return list(made)
