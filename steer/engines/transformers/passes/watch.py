"""Sees every forward pass of a model inside a `with` block, and every `generate` around it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from steer.engines.transformers.passes.call import PassCall, bound
from steer.engines.transformers.prompts import last_columns
from steer.errors import EngineError, Unsupported


@dataclass(frozen=True, eq=False)
class Generation:
    """A call of `generate` under way.

    `columns` are those of its whole prompt, which it may feed in chunks, on top of a cache, or
    together with candidates, and `mask` is the prompt's; None where the call does not say.
    """

    model: nn.Module
    columns: int | None = None
    mask: Tensor | None = None
    drafts_itself: bool = False

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generation:
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            mask = None
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        prompts = [
            prompt
            for prompt in (mask, kwargs.get("inputs_embeds"), ids)
            if isinstance(prompt, Tensor) and prompt.ndim >= 2
        ]
        config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
        early = kwargs.get("assistant_early_exit", getattr(config, "assistant_early_exit", None))
        itself = early is not None or kwargs.get("assistant_model") is model
        return cls(model, prompts[0].shape[1] if prompts else None, mask, itself)


class PassListener(Protocol):
    """Who follows the passes: told before and after each, and when a `generate` is over."""

    def begin(self, call: PassCall, generation: Generation | None) -> None: ...

    def end(self, output: Any) -> None: ...

    def generated(self) -> None: ...


class PassWatch:
    """Assumes: one forward pass at a time.

    Guarantees: `begin` and `end` around every pass of the last of `models` (which it goes through
    in this order), however it is called; a block of `blocks` that runs in no such pass is an error.
    """

    def __init__(
        self, models: list[nn.Module], blocks: Iterable[nn.Module], listener: PassListener
    ) -> None:
        self._models, self._blocks = models, set(blocks)
        self._listener = listener
        self._calls: list[tuple[nn.Module, dict[str, Any]]] = []
        self._generations: list[Generation] = []
        self._in_pass = False
        self.passes = 0
        """Passes seen, those that were refused too."""

    @property
    def generating(self) -> bool:
        """Whether a `generate` is under way."""
        return bool(self._generations)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The watch on its modules; they are as they were afterwards."""
        with ExitStack() as stack:
            decoder = self._models[-1]
            stack.callback(decoder.register_forward_hook(self._end).remove)
            for model in self._models:
                # Always first in and last out, whatever else is hooked to the model.
                enter = self._begin if model is decoder else self._enter
                before = model.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
                after = model.register_forward_hook(self._leave, always_call=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
                if hasattr(model, "generate"):
                    stack.enter_context(_overheard(model, self._generation))
            for block in self._blocks:
                stack.callback(block.register_forward_pre_hook(self._check_in_pass).remove)
            yield

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = bound(module, args, kwargs)
        self._calls.append((module, given))
        return args, _all_columns_computed(given, kwargs)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.passes += 1
        _check_not_recomputed(module)
        around = [given for _, given in reversed(self._calls)]
        generation = self._generations[-1] if self._generations else None
        self._listener.begin(PassCall(bound(module, args, kwargs), around), generation)
        self._in_pass = True

    def _end(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._listener.end(output)

    def _leave(self, module: nn.Module, _args: Any, _output: Any) -> None:
        """After a pass that failed, too."""
        if module is self._models[-1]:
            self._in_pass = False
        elif self._calls and self._calls[-1][0] is module:
            self._calls.pop()

    def _check_in_pass(self, module: nn.Module, _args: Any) -> None:
        if not self._in_pass:
            raise EngineError(
                f"a {type(module).__name__} of the steered model runs outside of a forward pass, "
                "where its tokens have no positions to be steered by: call the model",
                code="not_steered",
            )

    @contextmanager
    def _generation(self, generation: Generation) -> Iterator[None]:
        if generation.drafts_itself or any(
            one.model is generation.model for one in self._generations
        ):
            raise Unsupported(
                "the steered model would draft for itself inside its own generate "
                "(assistant_early_exit, or itself as assistant_model): give another "
                "assistant_model, or prompt_lookup_num_tokens",
                code="unclear_positions",
            )
        self._generations.append(generation)
        try:
            yield
        finally:
            self._generations.remove(generation)
            self._listener.generated()


Listen = Callable[[Generation], AbstractContextManager[None]]


def _all_columns_computed(given: Mapping[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` with the indices of the columns whose logits are kept, in place of their number:
    from a number some models (Gemma 4) compute later blocks for those columns alone."""
    kept = kwargs.get("logits_to_keep")
    fed = next((x for x in map(given.get, ("input_ids", "inputs_embeds")) if x is not None), None)
    if type(kept) is not int or kept == 0 or not isinstance(fed, Tensor):
        return kwargs
    columns = fed.shape[1]
    return {**kwargs, "logits_to_keep": last_columns(min(kept, columns), columns, fed.device)}


def _check_not_recomputed(module: nn.Module) -> None:
    # Checkpointed blocks run again on the way back, when the step of their pass is over.
    if (
        torch.is_grad_enabled()
        and module.training
        and any(getattr(one, "gradient_checkpointing", False) for one in module.modules())
    ):
        raise Unsupported(
            "gradient checkpointing runs blocks again outside of their pass, where they would not "
            "be steered: call gradient_checkpointing_disable() on the model first",
            code="gradient_checkpointing",
        )


class _Overheard:
    """A model's `generate` that tells of its calls, and otherwise is what it was."""

    def __init__(self, model: nn.Module) -> None:
        self.listeners: list[Listen] = []
        self._model, self._own = model, vars(model).get("generate")
        self._generate: Callable[..., Any] = model.generate  # type: ignore[assignment]
        functools.update_wrapper(self, self._generate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        generation = Generation.of(self._model, args, kwargs)
        with ExitStack() as stack:
            for listen in self.listeners:
                stack.enter_context(listen(generation))
            return self._generate(*args, **kwargs)

    def restore(self) -> None:
        """The model's `generate` as it was found."""
        del self._model.generate
        if self._own is not None:
            self._model.generate = self._own


@contextmanager
def _overheard(model: nn.Module, listen: Listen) -> Iterator[None]:
    """`listen` around every call of `model.generate`; several may, and leave in any order."""
    before = vars(model).get("generate")
    heard = before if isinstance(before, _Overheard) else _Overheard(model)
    heard.listeners.append(listen)
    model.generate = heard  # type: ignore[assignment]
    try:
        yield
    finally:
        heard.listeners.remove(listen)
        if not heard.listeners and vars(model).get("generate") is heard:
            heard.restore()
