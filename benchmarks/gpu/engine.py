"""The transformers engine on a GPU: a steered batch against each request alone, and its speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.cases import Case, Result, Results, lacking
from benchmarks.gpu.device import Device
from benchmarks.timing import interleaved
from benchmarks.vllm.diets import Batch, add, all_kinds
from benchmarks.vllm.report import Table, rate, times
from benchmarks.vllm.shapes import SHAPES, Shape, library
from steer.engines.base import GenerationRequest, SamplingParams
from steer.plan.cache import PlanCache
from steer.spec import parse_spec

PART = "engine"
PLAIN, UNSTEERED = "plain padded generate", "Steer, nothing steered"
LEAST = 0.99
"""Of the tokens, in float32: near ties may fall the other way in a batch of another size."""


@dataclass(frozen=True)
class Work:
    """`compared` requests are also computed alone, on `shallow` layers of a random model: float32
    takes twice the memory."""

    chats: int = 64
    prompt: int = 128
    tokens: int = 64
    rounds: int = 5
    compared: int = 16
    shallow: int = 8


class Engines:
    """The cases: on a random model of the shape, and on a real one where `model` is there."""

    def __init__(self, shape: Shape, device: Device, work: Work, model: str | None) -> None:
        self.shape, self.device, self.work, self.model = shape, device, work, model

    def cases(self) -> Iterator[Case]:
        shape = self.shape
        shallow = replace(shape, layers=min(self.work.shallow, shape.layers))
        for batching in ("packed", "rolling"):
            yield Case(
                f"{PART}/alone/{shallow.name}, {shallow.layers} layers/{batching}/float32",
                partial(self._alone, shallow, batching),
            )
            yield Case(
                f"{PART}/speed/{shape.name}/{batching}/bfloat16",
                partial(self._speed, shape, batching, "bfloat16"),
            )
        if self.model is not None:
            real = SHAPES["smollm2"]
            for batching in ("packed", "rolling"):
                yield Case(
                    f"{PART}/alone/{real.name}/{batching}/float32",
                    partial(self._alone, real, batching),
                )
                yield Case(
                    f"{PART}/speed/{real.name}/{batching}/bfloat16",
                    partial(self._speed, real, batching, "bfloat16"),
                )

    def missing(self) -> str | None:
        return lacking("transformers", "pydantic", "jaxtyping", "safetensors", "gguf")

    def table(self, found: Results) -> Table:
        rows = [row for name, result in found for row in _rows(name, result)]
        columns = ("model", "attention", "measured", "found", "holds, or × plain generate")
        return Table("The transformers engine", columns, rows)

    def _alone(self, shape: Shape, batching: str) -> Result:
        """A batch of all kinds, and each of its requests by itself."""
        torch.backends.cuda.matmul.allow_tf32 = False
        with self._engine(shape, batching, "float32") as engine:
            asked = self._requests(engine, shape, all_kinds(shape, self.work.compared))
            together = [list(one.tokens) for one in engine.complete(asked)]
            alone = [list(engine.complete([one])[0].tokens) for one in asked]
            plain = [
                list(one.tokens)
                for one in engine.complete([replace(one, plan=None) for one in asked])
            ]
            found = {"attention": _attention(engine)}
        same = [_agreed(a, b) for a, b in zip(together, alone, strict=True)]
        share = sum(same) / sum(map(len, alone))
        changed = sum(a != b for a, b in zip(together, plain, strict=True))
        return found | {"share": share, "answers_changed": changed, "holds": share >= LEAST}

    def _speed(self, shape: Shape, batching: str, dtype: str) -> Result:
        """Tokens per second of everybody in turn, on one model."""
        count = self.work.chats
        with self._engine(shape, batching, dtype) as engine:
            loads: dict[str, Batch] = {
                UNSTEERED: [None] * count,
                "Steer, an addition for each": [add(n, "all") for n in range(count)],
                "Steer, all kinds": all_kinds(shape, count),
            }
            contestants: dict[str, Callable[[], float]] = {
                name: self._completing(engine, self._requests(engine, shape, specs))
                for name, specs in loads.items()
            }
            contestants[PLAIN] = self._plain(shape, dtype)
            found = interleaved(contestants, rounds=self.work.rounds, title=shape.name)
            rates = {name: list(one.rates) for name, one in found.items()}
            return {"attention": _attention(engine), "tokens_per_second": rates}

    # Parts

    @contextmanager
    def _engine(self, shape: Shape, batching: str, dtype: str) -> Iterator[Any]:
        from steer.engines.transformers.engine import TransformersEngine  # noqa: PLC0415

        options: dict[str, Any] = {
            "batching": batching,
            "rows": self.work.chats,
            "cache_tokens": self._cache(),
        }
        if shape.name == SHAPES["smollm2"].name:
            engine = TransformersEngine.load(
                str(self.model), dtype=dtype, device=str(self.device.torch), **options
            )
        else:
            model = self._random(shape, getattr(torch, dtype))
            engine = TransformersEngine(model, None, name=shape.name, **options)
        with engine:
            yield engine

    def _cache(self) -> int:
        work = self.work
        return 2 * work.chats * (work.prompt + work.tokens)

    def _random(self, shape: Shape, dtype: torch.dtype) -> Any:
        """A model whose weights are drawn where they are used: nothing is shipped."""
        from transformers import LlamaForCausalLM  # noqa: PLC0415

        torch.manual_seed(0)
        config = shape.config(self.work.prompt + self.work.tokens + 1)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with self.device.torch:
                model: Any = LlamaForCausalLM(config)
                return model.eval()
        finally:
            torch.set_default_dtype(before)

    def _prompts(self, shape: Shape) -> list[tuple[int, ...]]:
        """Of different lengths, so that padding is met."""
        work, generator = self.work, torch.Generator().manual_seed(0)
        lengths = [work.prompt - n % max(1, work.prompt // 4) for n in range(work.chats)]
        return [
            tuple(torch.randint(3, shape.vocabulary, (length,), generator=generator).tolist())
            for length in lengths
        ]

    def _requests(self, engine: Any, shape: Shape, specs: Batch) -> list[GenerationRequest]:
        plans = PlanCache(library(shape), engine.info, engine.capabilities)
        sampling = SamplingParams(max_tokens=self.work.tokens, temperature=0, ignore_eos=True)
        return [
            GenerationRequest(
                str(n), prompt, sampling, None if spec is None else plans.plan(parse_spec(spec))
            )
            for n, (prompt, spec) in enumerate(
                zip(self._prompts(shape)[: len(specs)], specs, strict=True)
            )
        ]

    def _completing(
        self, engine: Any, requests: Sequence[GenerationRequest]
    ) -> Callable[[], float]:
        def work() -> float:
            made = float(sum(len(one.tokens) for one in engine.complete(requests)))
            self.device.wait()
            return made

        return work

    def _plain(self, shape: Shape, dtype: str) -> Callable[[], float]:
        """transformers' own `generate` of one padded batch, on a model that Steer never touched."""
        model, device = self._untouched(shape, dtype), self.device.torch
        prompts, tokens = self._prompts(shape), self.work.tokens
        width = max(map(len, prompts))
        ids = [[0] * (width - len(one)) + list(one) for one in prompts]
        mask = [[0] * (width - len(one)) + [1] * len(one) for one in prompts]
        inputs = {"input_ids": ids, "attention_mask": mask}
        given = {name: torch.tensor(one, device=device) for name, one in inputs.items()}

        @torch.inference_mode()
        def work() -> float:
            out = model.generate(
                **given,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
            self.device.wait()
            return float(len(prompts) * (out.shape[1] - width))

        return work

    def _untouched(self, shape: Shape, dtype: str) -> Any:
        if shape.name != SHAPES["smollm2"].name:
            return self._random(shape, getattr(torch, dtype))
        from transformers import AutoModelForCausalLM  # noqa: PLC0415

        from steer.engines.transformers.checkpoints.found import find_model  # noqa: PLC0415

        found: Any = AutoModelForCausalLM.from_pretrained(
            find_model(str(self.model)).location, dtype=getattr(torch, dtype)
        )
        return found.to(self.device.torch)


def _rows(name: str, result: Result) -> Iterator[tuple[str, ...]]:
    what, model, batching, dtype = name.split("/")
    head = (f"{model}, {batching}, {dtype}", str(result.get("attention", "")))
    if "tries" in result:
        yield (*head, what, str(result["error"])[:80], "NO")
    elif what == "alone":
        told = f"{100 * result['share']:.1f} % of the tokens; {result['answers_changed']} steered"
        yield (*head, "together as alone", told, "yes" if result["holds"] else "NO")
    else:
        rates = result["tokens_per_second"]
        for who, mine in rates.items():
            ratios = [a / b for a, b in zip(mine, rates[PLAIN], strict=True)]
            yield (*head, who, f"{rate(mine)} tokens/s", times([ratios]))


def _attention(engine: Any) -> str:
    """What a packed batch attends by; empty where it is not packed."""
    return str(getattr(getattr(engine._batch, "packed_model", None), "_packed_attention", ""))


def _agreed(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(other))
