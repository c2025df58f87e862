"""One vLLM engine in a process of its own, idle until it is told to compute.

Started by `benchmarks.vllm.pair` as `python -m benchmarks.vllm.worker FD SETTINGS`, and told what
to do through the socket FD.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.child import obey
from benchmarks.vllm.calls import Calls, counted
from benchmarks.vllm.shapes import MAX_LENGTH, SLOTS
from steer.engines.vllm import plugin
from steer.engines.vllm.front.drivers import InlineDriver
from steer.engines.vllm.front.engine import VllmEngine
from steer.engines.vllm.front.ticket_issuer import TicketIssuer
from steer.engines.vllm.messages import read_receipt
from steer.engines.vllm.options import registry_location
from steer.engines.vllm.ticket import Ticket
from steer.plan.cache import PlanCache
from steer.readouts.compiler import compile_readouts
from steer.readouts.plan import ReadoutPlan
from steer.readouts.spec import ReadoutSpec
from steer.registry.blobs.plan_store import PlanStore
from steer.registry.registry import Registry
from steer_server.generation.kept_specs import spec_of
from steer_server.vllm.fetching.arrived_readouts import ArrivedReadouts

Prompts = Sequence[Sequence[int]]
Specs = Sequence[dict[str, Any] | None]


class Engine:
    """vLLM's own `LLM`, stepped by hand, the same with the plugin and without."""

    def __init__(
        self,
        model: str,
        *,
        steered: bool,
        eager: bool,
        dtype: str = "float32",
        weights: bool = True,
    ) -> None:
        from vllm import LLM  # noqa: PLC0415

        if steered:
            plugin.register()
        self._llm = LLM(
            model=model,
            skip_tokenizer_init=True,
            dtype=dtype,
            load_format="auto" if weights else "dummy",
            enforce_eager=eager,
            max_model_len=MAX_LENGTH,
            max_num_seqs=SLOTS,
            max_num_batched_tokens=SLOTS * 16,
            block_size=32,
            enable_prefix_caching=False,
            gpu_memory_utilization=0.3,
        )
        self._engine = self._llm.llm_engine
        self._driver = InlineDriver(self._llm)
        self._front: VllmEngine | None = None
        self._arrived = ArrivedReadouts()
        if steered:
            issuer = TicketIssuer(PlanStore(registry_location()))
            answers = self._driver.rpc("steer_info")
            self._front = VllmEngine(self._driver, None, answers, issuer, frozenset())
            self._arrived.watch(self._engine.output_processor)
        self._opened: dict[str, tuple[Registry, PlanCache]] = {}
        self._reads: ReadoutPlan | None = None
        self._asked: dict[str, tuple[Ticket | None, int]] = {}
        self._made: dict[str, list[int]] = {}
        self._tokens = self._number = 0

    # Orders

    def start(
        self,
        specs: Specs,
        prompts: Prompts,
        tokens: int,
        inspect: dict[str, Any] | None = None,
    ) -> float:
        """Adds a batch and computes its prompts; the seconds this took. What `inspect` asks for is
        read of every generated token of all."""
        gc.collect()
        self._tokens, self._asked, self._made = tokens, {}, {}
        self._reads = None if inspect is None else self._compiled(inspect)
        started = time.perf_counter()
        self._add(specs, prompts, tokens)
        while len(self._made) < len(prompts):
            self._take(self._engine.step())
        return time.perf_counter() - started

    def steps(self, count: int) -> list[float]:
        """The seconds of each of the next `count` steps, in every one of which all decode."""
        seconds, outputs = [], []
        for _ in range(count):
            started = time.perf_counter()
            outputs.append(self._engine.step())
            seconds.append(time.perf_counter() - started)
        for output in outputs:
            if len(output) != len(self._asked):
                raise RuntimeError(f"a step gave {len(output)} of {len(self._asked)} tokens")
            self._take(output)
        return seconds

    def finish(self) -> int:
        """Runs the batch to its end and asks for its receipts; how many tokens were steered. Raises
        `RuntimeError` where not everything came that was to be read."""
        while self._engine.has_unfinished_requests():
            self._take(self._engine.step())
        self._engine.step()
        short = [key for key, made in self._made.items() if len(made) != self._tokens]
        if short:
            raise RuntimeError(f"{len(short)} requests did not get {self._tokens} tokens")
        self._check_read()
        return self._receipts()

    def chats(
        self, specs: Specs, prompts: Prompts, tokens: int, registry: str = ""
    ) -> tuple[float, list[list[int]]]:
        """A whole job with plans, tickets and receipts: tokens per second, and the tokens."""
        gc.collect()
        self._tokens, self._asked, self._made, self._reads = tokens, {}, {}, None
        started = time.perf_counter()
        self._add(specs, prompts, tokens, registry)
        self.finish()
        seconds = time.perf_counter() - started
        found = [self._made[key] for key in self._asked]
        return sum(map(len, found)) / seconds, found

    def counted(self, specs: Specs, prompts: Prompts, tokens: int) -> dict[str, Any]:
        """The calls of the job that `chats` times."""
        calls = Calls()
        with counted(calls):
            self.chats(specs, prompts, tokens)
        return calls.as_json()

    def hooked(
        self, rows: Sequence[Sequence[float]], layer: int, prompts: Prompts, tokens: int
    ) -> tuple[float, list[list[int]]]:
        """The same job as research code does it: a hook on a decoder layer, one call each."""
        layers: list[torch.nn.Module] = []
        self._llm.apply_model(lambda model: layers.append(model.model.layers[layer]))
        gc.collect()
        found, seconds = [], 0.0
        for n, prompt in enumerate(prompts):
            row = torch.tensor(rows[n % len(rows)])
            started = time.perf_counter()

            def shift(_module: object, _given: object, out: Any, row: torch.Tensor = row) -> Any:
                return out[0] + row, out[1]

            hook = layers[0].register_forward_hook(shift)
            try:
                made = self._llm.generate(
                    {"prompt_token_ids": list(prompt)}, self._params(tokens, None), use_tqdm=False
                )
            finally:
                hook.remove()
            seconds += time.perf_counter() - started
            found.append(list(made[0].outputs[0].token_ids))
        return sum(map(len, found)) / seconds, found

    def _add(self, specs: Specs, prompts: Prompts, tokens: int, registry: str = "") -> None:
        for spec, prompt in zip(specs, prompts, strict=True):
            ticket = None
            if spec is not None or self._reads is not None:
                if self._front is None:
                    raise RuntimeError("the plain engine cannot steer, or read")
                plan = None
                if spec is not None:
                    _, plans = self._open(registry or registry_location())
                    plan = plans.plan(spec_of(spec, at=""))
                ticket = self._front.tickets.issue(plan, readouts=self._reads, arriving=True)
                if self._reads is not None:
                    self._arrived.expect(ticket.key)
            self._number += 1
            key = f"r{self._number}"
            self._asked[key] = (ticket, len(prompt))
            prompt_ids = {"prompt_token_ids": list(prompt)}
            self._engine.add_request(key, prompt_ids, self._params(tokens, ticket, delta=True))

    def _params(self, tokens: int, ticket: Ticket | None, *, delta: bool = False) -> Any:
        from vllm import SamplingParams  # noqa: PLC0415
        from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

        return SamplingParams(
            max_tokens=tokens,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA if delta else RequestOutputKind.FINAL_ONLY,
            extra_args=None if ticket is None else ticket.as_extra_args(),
        )

    def _open(self, place: str) -> tuple[Registry, PlanCache]:
        """The registry at `place`, and the plans that were made with it."""
        if place not in self._opened:
            assert self._front is not None
            library = Registry.open(place)
            plans = PlanCache(library, self._front.info, self._front.capabilities)
            self._opened[place] = library, plans
        return self._opened[place]

    def _compiled(self, inspect: dict[str, Any]) -> ReadoutPlan:
        if self._front is None:
            raise RuntimeError("the plain engine cannot read")
        library, _ = self._open(registry_location())
        front, spec = self._front, ReadoutSpec.model_validate(inspect)
        return compile_readouts(spec, library, front.info, front.capabilities, None)

    def _check_read(self) -> None:
        """Raises `RuntimeError` where a generated token that was fed was not read."""
        if self._reads is None:
            return
        for ticket, length in self._asked.values():
            assert ticket is not None
            rows = self._arrived.take(ticket.key, length + self._tokens - 1, self._reads.width)
            self._arrived.forget(ticket.key)
            if rows is None or len(rows) != self._tokens - 1:
                found = "nothing" if rows is None else f"{len(rows)} tokens"
                raise RuntimeError(f"{found} of {self._tokens - 1} tokens were read")

    def _take(self, outputs: Sequence[Any]) -> None:
        for output in outputs:
            self._made.setdefault(output.request_id, []).extend(output.outputs[0].token_ids)

    def _receipts(self) -> int:
        asked = [
            (ticket.key, {0: length + self._tokens - 1})
            for ticket, length in self._asked.values()
            if ticket is not None and ticket.plan is not None
        ]
        if not asked:
            return 0
        answers = self._driver.rpc("steer_receipts", asked)[0][0]
        return sum(read_receipt(answer[0]).tokens_steered for answer in answers)


ORDERS = ("start", "steps", "finish", "chats", "counted", "hooked")


def main() -> None:
    settings = json.loads(sys.argv[2])
    obey(int(sys.argv[1]), lambda: Engine(**settings), ORDERS)


if __name__ == "__main__":
    main()
