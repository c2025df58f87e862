"""A LoRA adapter on a model for as long as a pass lasts; its weights are left as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from steer.artefacts.lora import LoraPart
from steer.errors import IncompatibleArtefact


def lora_modules(model: nn.Module, parts: Mapping[str, LoraPart]) -> dict[str, nn.Module]:
    """The modules that `parts` are for, by their names.

    Raises `IncompatibleArtefact` (`wrong_lora`) where `model` has one not, or of another size.
    """
    known = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for name, part in parts.items():
        module = known.get(name)
        if module is None:
            raise IncompatibleArtefact(
                f"the adapter changes {name[:200]!r}, and this model has no such module: it is "
                "for another architecture",
                code="wrong_lora",
            )
        wanted, real = {part.down.shape[1], len(part.up)}, _sizes(module)
        if wanted != real:
            raise IncompatibleArtefact(
                f"the adapter changes {name[:200]!r} of the sizes {sorted(wanted)}; the model's "
                f"has {sorted(real) or 'no weight of two'}: it is for a model of another size",
                code="wrong_lora",
            )
        found[name] = module
    return found


def _sizes(module: nn.Module) -> set[int]:
    weight = getattr(module, "weight", None)
    return set(weight.shape) if isinstance(weight, Tensor) and weight.ndim == 2 else set()


@contextmanager
def with_lora(modules: Mapping[str, nn.Module], parts: Mapping[str, LoraPart]) -> Iterator[None]:
    """Every one of `modules` adds its part to what it computes, before any other hook sees it.

    Products are in the parts' own type, which for float32 is what PEFT computes.
    """
    with ExitStack() as hooks:
        for name, module in modules.items():
            handle = module.register_forward_hook(_adding(parts[name]), prepend=True)
            hooks.callback(handle.remove)
        yield


def _adding(part: LoraPart) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].to(part.down.dtype)
        change = (x @ part.down.mT) @ part.up.mT * part.scale
        return (output + change).to(output.dtype)

    return after
