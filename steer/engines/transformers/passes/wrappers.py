"""The model inside what is handed to `attach`, and the modules that its passes go through.

Wrappers call what they wrap in their own ways (PEFT calls `forward` and not the module, a compiled
model its graph), so nothing is hung on them: every pass of a language model goes through its
decoder, the innermost model around the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from steer.errors import Unsupported

_PARALLEL = ("DataParallel", "FullyShardedDataParallel")
"""Wrappers whose passes run in copies or in pieces of the module that is in hand."""


def wrapped_model(model: Any) -> nn.Module:
    """The transformers model inside `model`: itself, or what PEFT, `torch.compile`, accelerate,
    DDP or a module of one's own wraps.

    Raises `Unsupported` (`unsupported_model`) for what does not run the module that it holds, for
    what holds several models or none, and for virtual tokens in front of the prompt.
    """
    if not isinstance(model, nn.Module):
        inner = isinstance(getattr(model, "model", None), nn.Module)
        raise _refused(
            f"attach takes a model, and this is a {type(model).__name__}"
            + (": attach to its .model" if inner else "")
        )
    found = list(_outermost(model))
    if len(found) != 1:
        names = ", ".join(type(one).__name__ for one in found) or "no transformers model"
        raise _refused(
            f"{type(model).__name__} holds {names}: attach to the one language model that generates"
        )
    if found[0].config.is_encoder_decoder:
        raise _refused(
            f"{type(found[0]).__name__} has an encoder and a decoder: positions and phases are "
            "those of a prompt that the same blocks continue, so only decoder-only models are "
            "steered"
        )
    _check_weights(found[0])
    return found[0]


def modules_of_a_pass(model: nn.Module, block: nn.Module) -> list[nn.Module]:
    """The models that a pass through `block` goes through, outermost first, the decoder last."""
    around: list[nn.Module] = [
        one
        for one in model.modules()
        if isinstance(one, PreTrainedModel) and one is not block and block in set(one.modules())
    ]
    return around or [model]


def _outermost(module: nn.Module) -> Iterator[PreTrainedModel]:
    """The transformers models in `module` that are in no other one."""
    _check_wrapper(module)
    if isinstance(module, PreTrainedModel):
        yield module
        return
    for child in module.children():
        yield from _outermost(child)


def _check_wrapper(module: nn.Module) -> None:
    name = type(module).__name__
    if name in _PARALLEL:
        raise _refused(
            f"a model in {name} runs in other modules than the one that it wraps, where no hook "
            "is: attach to the model itself (.module) on one device, or serve it with vLLM"
        )
    configs = getattr(module, "peft_config", None)
    for config in configs.values() if isinstance(configs, dict) else ():
        if getattr(config, "is_prompt_learning", False):
            raise _refused(
                f"the {type(config).__name__} of {name} puts virtual tokens in front of the "
                "prompt, which have no place in it: steer the base model, or a LoRA"
            )


def _check_weights(model: nn.Module) -> None:
    name = type(model).__name__
    devices = {str(parameter.device) for parameter in model.parameters()}
    if "meta" in devices:
        raise _refused(
            f"weights of {name} are offloaded and on no device between passes: load it without "
            "offloading (no device_map, or one that fits)"
        )
    if len(devices) > 1:
        raise _refused(
            f"{name} is spread over {', '.join(sorted(devices))}: load it on one device, or serve "
            "it with vLLM"
        )
    if any(type(one).__name__ == "OptimizedModule" for one in model.modules()):
        raise _refused(
            f"parts of {name} were replaced by torch.compile(part), in which its blocks are not "
            "found: compile them in their place (part.compile()), or compile the model"
        )


def _refused(message: str) -> Unsupported:
    return Unsupported(message, code="unsupported_model")
