"""The model with autograd on: the same hook points, without tables, caches or copies."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steer.artefacts.lora import LoraPart
from steer.engines.gradients import Edit, Traced
from steer.engines.transformers.hooks import HookedModel
from steer.engines.transformers.lora.applied import lora_modules, with_lora
from steer.engines.transformers.structure.calls import first_tensor, given_tensor, with_tensor
from steer.engines.transformers.structure.sites import HookTarget
from steer.model import HookPoint

_NUMBERED = re.compile(r"\.\d+\.")
"""In the names of what lies in blocks, not in the head."""


class TransformersGradients:
    """A `DifferentiableModel`. Make it with `differentiating`, which switches autograd on."""

    def __init__(self, hooked: HookedModel) -> None:
        self._hooked = hooked

    @property
    def device(self) -> torch.device:
        return self._hooked.device

    def linear_modules(self) -> Mapping[str, tuple[int, int]]:
        found = {}
        for name, module in self._hooked.model.named_modules():
            if isinstance(module, nn.Linear) and _NUMBERED.search(name):
                found[name] = (module.in_features, module.out_features)
        return found

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        edits: Mapping[HookPoint, Edit],
        capture: Sequence[HookPoint] = (),
        lora: Mapping[str, LoraPart] | None = None,
    ) -> Traced:
        # Padding on the right needs no mask: no token sees what comes after it.
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(list(prompt))
        states: dict[HookPoint, Tensor] = {}
        with ExitStack() as hooks:
            if lora is not None:
                modules = lora_modules(self._hooked.model, lora)
                hooks.enter_context(with_lora(modules, lora))
            for point in {*edits, *capture}:
                visit = _visit(point, edits.get(point), point in capture, states)
                hooks.enter_context(_installed(self._hooked.map.targets[point], visit))
            outputs = self._hooked.model(input_ids=ids.to(self.device), use_cache=False)
        return Traced(outputs.logits.float(), states)

    def unembed(self, states: Tensor) -> Tensor:
        return self._hooked.unembed(states)


@contextmanager
def differentiating(hooked: HookedModel) -> Iterator[TransformersGradients]:
    """Autograd on, the model's weights held constant; as it was afterwards."""
    learning = [p for p in hooked.model.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield TransformersGradients(hooked)
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _visit(
    point: HookPoint, edit: Edit | None, kept: bool, states: dict[HookPoint, Tensor]
) -> Callable[[Tensor], Tensor]:
    def visit(x: Tensor) -> Tensor:
        if edit is not None:
            x = edit(x).to(x.dtype)
        if kept:
            states[point] = x.float()
        return x

    return visit


@contextmanager
def _installed(target: HookTarget, visit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def after(module: nn.Module, args: Any, output: Any) -> Any:
        edited = visit(first_tensor(output))
        return edited if isinstance(output, Tensor) else (edited, *output[1:])

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = given_tensor(args, kwargs)
        assert x is not None
        # Where the block reads the same tensor again beside this module, it is written to; the edit
        # then reads a copy, which the way back still needs as it was.
        edited = x.copy_(visit(x.clone())) if target.in_place else visit(x)
        return with_tensor(args, kwargs, edited)

    if target.side == "output":
        handle = target.module.register_forward_hook(after)
    else:
        handle = target.module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
