"""What Steer does with every class of transformers that generates text, found by trying it.

`make models-page` writes the table of docs/models.md anew.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from artefacts import random_vector
from shrunken import VOCABULARY, NotBuilt, tiny
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

import steer
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest, GenerationRequest, SamplingParams
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError, Unsupported
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.spec import parse_spec

PAGE = Path(__file__).parents[3] / "docs" / "models.md"
TOKENS = 6
_FORMS = {"RollingBatch": "padded", "AloneBatch": "alone", "PackedBatch": "packed"}


@dataclass(frozen=True)
class Found:
    """One row of the table."""

    name: str
    outcome: str
    """`served`, `refused` or `not built`."""
    form: str = ""
    sites: str = ""
    lens: str = ""
    attach: str = ""
    reason: str = ""

    @property
    def row(self) -> str:
        cells = (self.name, self.outcome, self.form, self.sites, self.lens, self.attach)
        return "| " + " | ".join((*cells, self.reason)) + " |"


def classes() -> dict[str, type[PreTrainedModel]]:
    """Every class of the two mappings, by name."""
    found: dict[str, type[PreTrainedModel]] = {}
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        for entry in mapping.values():
            for one in entry if isinstance(entry, tuple) else (entry,):
                found.setdefault(one.__name__, one)
    return dict(sorted(found.items()))


def survey(model_class: type[PreTrainedModel]) -> Found:
    """What becomes of `model_class`. Fails where a served model is not exact."""
    name = model_class.__name__
    try:
        model: Any = tiny(model_class)
    except NotBuilt as reason:
        return Found(name, "not built", reason=_cell(reason))
    # How its own generate chooses tokens is no part of what is compared.
    model.generation_config = GenerationConfig()
    try:
        with TransformersEngine(model, None, rows=4, slots=4) as engine:
            return _served(engine, model, name)
    except Unsupported as refusal:
        if refusal.code != "unsupported_model":
            raise
        return Found(name, "refused", reason=_cell(refusal))


def _served(engine: TransformersEngine, model: Any, name: str) -> Found:
    prompts = _prompts()
    layer = engine.info.n_layers // 2
    vector = random_vector(3, layer, width=engine.info.d_model)
    spec = {"interventions": [{"kind": "add", "vector": "v"}]}
    plans = PlanCache(MemoryLibrary({"v": vector}), engine.info, engine.capabilities)
    plan = plans.plan(parse_spec(spec))
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    done = engine.complete(
        [GenerationRequest(f"{n}", p, sampling, plan) for n, p in enumerate(prompts)]
        + [GenerationRequest("plain", prompts[0], sampling)]
    )
    assert list(done[-1].tokens) == generate(model, prompts[0])
    with _added(engine._hooked.map.targets[HookPoint(layer)].module, vector[layer]):
        steered = [generate(model, prompt) for prompt in prompts]
    assert [list(one.tokens) for one in done[:-1]] == steered
    _compare_states(engine, model, prompts[1])
    return Found(
        name,
        "served",
        _FORMS[type(engine._batch).__name__],
        ", ".join(engine.info.sites),
        "yes" if _compare_lens(engine, prompts[1]) else "no",
        "yes" if _attached(model, spec, vector, prompts[1]) == steered[1] else "no",
    )


def generate(model: Any, prompt: tuple[int, ...]) -> list[int]:
    """Greedy tokens by the model's own generate."""
    ids = torch.tensor([prompt])
    config = GenerationConfig(
        do_sample=False, max_new_tokens=TOKENS, eos_token_id=-1, pad_token_id=0
    )
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def _prompts() -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randint(13, VOCABULARY, (length,), generator=generator).tolist())
        for length in (4, 9, 14)
    ]


@contextmanager
def _added(block: nn.Module, vector: Tensor) -> Iterator[None]:
    def add(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output + vector
        return type(output)((output[0] + vector, *output[1:]))

    handle = block.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _compare_states(engine: TransformersEngine, model: Any, prompt: tuple[int, ...]) -> None:
    """The captured stream is what the model itself calls its hidden states, where it tells."""
    points = tuple(HookPoint(layer, "resid_pre") for layer in range(engine.info.n_layers))
    (captured,) = engine.capture(CaptureRequest([prompt], points))
    (first,) = engine.capture(CaptureRequest([prompt], points, positions=(0,)))
    for point in points:
        assert torch.allclose(first.states[point][0], captured.states[point][0], atol=1e-4)
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([prompt]), use_cache=False, output_hidden_states=True)
    told = getattr(out, "hidden_states", None)
    if told is None or len(told) != len(points) + 1:
        return
    # Most tell each block's input, and the normed end; Mamba and RWKV each block's output.
    pairs = zip(points, told, strict=False)
    if not torch.allclose(captured.states[points[0]], told[0][0].float(), atol=1e-4):
        pairs = zip(points[1:], told, strict=False)
    for point, state in pairs:
        assert torch.allclose(captured.states[point], state[0].float(), atol=1e-4), point


def _compare_lens(engine: TransformersEngine, prompt: tuple[int, ...]) -> bool:
    last = HookPoint(engine.info.n_layers - 1)
    (captured,) = engine.capture(CaptureRequest([prompt], (last,), logits="all"))
    try:
        read = engine.unembed(captured.states[last])
    except Unsupported:
        return False
    assert captured.logits is not None
    assert torch.allclose(read, captured.logits, atol=1e-3, rtol=1e-3)
    return True


def _attached(model: Any, spec: Any, vector: Any, prompt: tuple[int, ...]) -> list[int] | None:
    try:
        with steer.attach(model, spec, vectors={"v": vector}):
            return generate(model, prompt)
    except (SteerError, ValueError, AttributeError):
        return None


def _cell(reason: Exception) -> str:
    text = " ".join(str(reason).split()).replace("|", "\\|")
    return text if len(text) <= 160 else text[:159] + "…"


def write() -> None:
    """Writes the table anew."""
    transformers.logging.set_verbosity_error()
    rows = []
    for name, model_class in classes().items():
        print(name, file=sys.stderr)
        rows.append(survey(model_class).row)
    head, _, _ = PAGE.read_text().partition("| class |")
    title = "| class | outcome | form | sites | lens | `attach` | reason |\n" + "|---" * 7 + "|"
    PAGE.write_text(head + "\n".join([title, *rows]) + "\n")


if __name__ == "__main__":
    write()
