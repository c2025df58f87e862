"""Requests that bring a LoRA adapter: refused where an engine has none, grouped where it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from steer.artefacts.lora import Lora
from steer.engines.base import Completion, GenerationRequest
from steer.errors import Unsupported
from steer.model import Capabilities


def check_lora(request: GenerationRequest, capabilities: Capabilities) -> None:
    """Raises `Unsupported` (`no_lora`) for an adapter that the engine cannot run with."""
    if request.lora is None or capabilities.lora:
        return
    advice = "choose another engine, or ask without an adapter"
    if capabilities.engine == "vllm":
        advice = "start vLLM with --enable-lora, on a CPU with --max-loras 2 as well"
    raise Unsupported(
        f"this {capabilities.engine} engine runs no LoRA adapters: {advice}", code="no_lora"
    )


def refuse_lora(request: GenerationRequest) -> None:
    """Raises `Unsupported` (`no_lora`) for an adapter where answers are given token by token."""
    if request.lora is not None:
        raise Unsupported(
            "a request with a LoRA adapter is answered as a whole: use `complete`", code="no_lora"
        )


def by_adapter(
    requests: Sequence[GenerationRequest],
    run: Callable[[Lora | None, Sequence[GenerationRequest]], list[Completion]],
) -> list[Completion]:
    """What `run` makes of those without an adapter, and of those of each, one adapter after the
    other; in the order of `requests`."""
    groups: dict[str | None, list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(None if request.lora is None else request.lora.sha256, []).append(number)
    found: dict[int, Completion] = {}
    for numbers in groups.values():
        asked = [requests[n] for n in numbers]
        found.update(zip(numbers, run(asked[0].lora, asked), strict=True))
    return [found[n] for n in range(len(requests))]
