"""What answers the chats in a process of its own, without a server.

Started as `python -m benchmarks.smollm2.worker FD NAME JOB` in the environment of what it measures.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from benchmarks.child import obey
from benchmarks.smollm2.job import Job, read

Answers = list[list[int]]
Timed = tuple[float, Answers]


class Generate:
    """transformers' own `generate` of one padded batch, on a model that Steer never touched."""

    def __init__(self, job: Job) -> None:
        from transformers import AutoModelForCausalLM  # noqa: PLC0415

        self.job = job
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            job.model, dtype=getattr(torch, job.dtype)
        )
        # So that an answer goes on behind its end, as `ignore_eos` has it elsewhere.
        self.model.generation_config.eos_token_id = None

    def unsteered(self) -> Timed:
        return self.timed([range(len(self.job.prompts))])

    def expected(self, steered: str) -> Answers:
        """What everybody's answers are held against: `generate`, with hooks that add chat n's own
        row to the output of each layer where it is `"by specs"` or `"by one vector"`."""
        edits = {"not": [], "by specs": self.job.edits, "by one vector": self.job.edits[:1]}[
            steered
        ]
        if not edits:
            return self.unsteered()[1]
        chosen = [edits[n % len(edits)] for n in range(len(self.job.prompts))]
        with ExitStack() as stack:
            for layer in edits[0]:
                # [chats, 1, d_model]
                rows = torch.tensor([[edit[layer]] for edit in chosen], dtype=self.model.dtype)
                stack.enter_context(self._added(layer, rows))
            return self.unsteered()[1]

    @contextmanager
    def _added(self, layer: int, rows: torch.Tensor) -> Iterator[None]:
        block = self.model.model.layers[layer]
        hook = block.register_forward_hook(lambda _module, _given, out: out + rows)
        try:
            yield
        finally:
            hook.remove()

    def timed(
        self,
        batches: Sequence[Iterable[int]],
        around: Callable[[int], AbstractContextManager[object]] | None = None,
    ) -> Timed:
        """One `generate` after the other for batches of chats, which they name by number; `around`
        is given the number of a batch."""
        found: dict[int, list[int]] = {}
        started = time.perf_counter()
        for number, batch in enumerate(batches):
            with ExitStack() as stack:
                if around is not None:
                    stack.enter_context(around(number))
                found |= dict(zip(batch, self._answers(list(batch)), strict=True))
        seconds = time.perf_counter() - started
        return seconds, [found[n] for n in sorted(found)]

    @torch.inference_mode()
    def _answers(self, batch: Sequence[int]) -> Answers:
        prompts = [self.job.prompts[n] for n in batch]
        width = max(map(len, prompts))
        out = self.model.generate(
            torch.tensor([[0] * (width - len(one)) + one for one in prompts]),
            attention_mask=torch.tensor(
                [[0] * (width - len(one)) + [1] * len(one) for one in prompts]
            ),
            max_new_tokens=self.job.tokens,
            do_sample=False,
            pad_token_id=0,
        )
        answers: Answers = out[:, width:].tolist()
        return answers


class SteeringVectors(Generate):
    """The package steering-vectors: a model has one vector at a time."""

    def __init__(self, job: Job) -> None:
        from steering_vectors import SteeringVector  # noqa: PLC0415

        super().__init__(job)
        self._vectors = [
            SteeringVector(
                {layer: torch.tensor(row, dtype=self.model.dtype) for layer, row in edit.items()},
                layer_type="decoder_block",
            )
            for edit in job.edits
        ]

    def by_spec(self) -> Timed:
        """The chats of each spec in one padded batch."""
        count = len(self._vectors)
        batches = [range(n, len(self.job.prompts), count) for n in range(count)]
        return self.timed([one for one in batches if one], self._applied)

    def by_chat(self) -> Timed:
        """As requests come in."""
        return self.timed([[n] for n in range(len(self.job.prompts))], self._applied)

    def _applied(self, number: int) -> AbstractContextManager[object]:
        found: AbstractContextManager[object] = self._vectors[number % len(self._vectors)].apply(
            self.model
        )
        return found


class Steer:
    """Steer's transformers engine, all chats in one batch."""

    def __init__(self, job: Job) -> None:
        from steer.engines.plans import plans_of  # noqa: PLC0415
        from steer.engines.transformers.engine import TransformersEngine  # noqa: PLC0415
        from steer.registry.registry import Registry  # noqa: PLC0415

        self._job = job
        self._engine = TransformersEngine.load(job.model, dtype=job.dtype, rows=len(job.prompts))
        self._engine.start()
        self._plans = plans_of(self._engine, Registry.open(job.registry))

    def unsteered(self) -> Timed:
        return self._timed([None])

    def specs(self) -> Timed:
        return self._timed(self._job.specs)

    def _timed(self, specs: Sequence[dict[str, Any] | None]) -> Timed:
        """From the specs on: a plan is made, or found, in the time that is counted."""
        from steer.engines.base import GenerationRequest, SamplingParams  # noqa: PLC0415
        from steer.spec import parse_spec  # noqa: PLC0415

        sampling = SamplingParams(max_tokens=self._job.tokens, temperature=0, ignore_eos=True)
        started = time.perf_counter()
        requests = []
        for n, prompt in enumerate(self._job.prompts):
            spec = specs[n % len(specs)]
            plan = None if spec is None else self._plans.plan(parse_spec(spec))
            requests.append(GenerationRequest(str(n), tuple(prompt), sampling, plan))
        done = self._engine.complete(requests)
        seconds = time.perf_counter() - started
        return seconds, [list(one.tokens) for one in done]


PROGRAMS: dict[str, Callable[[Job], object]] = {
    "generate": Generate,
    "steer": Steer,
    "steering-vectors": SteeringVectors,
}
ORDERS = ("unsteered", "expected", "specs", "by_spec", "by_chat")


def main() -> None:
    descriptor, name, job = sys.argv[1:]
    obey(int(descriptor), lambda: PROGRAMS[name](read(job)), ORDERS)


if __name__ == "__main__":
    main()
