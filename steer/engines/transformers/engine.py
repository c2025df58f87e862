"""The transformers engine: any decoder-only Hugging Face model, on a laptop or one GPU."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from steer.artefacts.lora import Lora
from steer.artefacts.sae.architectures import SUPPORTED
from steer.batch.tables import MAX_RULES, Tables
from steer.engines.base import (
    Captured,
    CaptureRequest,
    Completion,
    EngineStats,
    GenerationRequest,
    QueriesKeys,
    TokenEvent,
)
from steer.engines.checks import (
    check_attends,
    check_carry,
    check_projection,
    check_readouts,
    check_request,
    check_scores,
)
from steer.engines.gradients import DifferentiableModel
from steer.engines.listeners import AsyncListener, BlockingListener, Mailbox
from steer.engines.lora import by_adapter, check_lora, refuse_lora
from steer.engines.threads import apart
from steer.engines.transformers.batching import Batching, make_batch
from steer.engines.transformers.capture import capture_batch
from steer.engines.transformers.checkpoints.found import find_model
from steer.engines.transformers.checkpoints.loading import load_checkpoint
from steer.engines.transformers.checkpoints.placing import chosen_device, chosen_dtype
from steer.engines.transformers.gradients import differentiating
from steer.engines.transformers.grammar import Grammars
from steer.engines.transformers.hooks import HookedModel
from steer.engines.transformers.lora.runs import LoraRuns
from steer.engines.transformers.scheduler import Handed, Scheduler, Submission
from steer.engines.transformers.structure.blocks import find_hook_points
from steer.errors import SteerError
from steer.formats.guards.stand_ins import check_model_folder
from steer.model import PROJECTED_SITES, SAMPLING, Capabilities, HookPoint, ModelInfo
from steer.prompts import ends
from steer.prompts.roles import found_roles
from steer.readouts.spec import READOUTS
from steer.spec import KINDS

Result = TypeVar("Result")


class TransformersEngine:
    """An `Engine` over a `PreTrainedModel`.

    Requests with different specs share one batch, padded on a CPU and packed on a GPU (`batching`);
    models for which neither is exact run each sequence alone;
    nothing is cached between requests, so no steered state can reach another request.
    """

    info: ModelInfo
    capabilities: Capabilities
    tokenizer: Any

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        name: str = "model",
        rows: int = 64,
        slots: int = 256,
        prefill_tokens: int = 4096,
        chunk: int = 512,
        batching: Batching = "auto",
        cache_tokens: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._hooked = HookedModel(model.eval(), find_hook_points(model, name))
        self.info = self._hooked.info
        self._tables = Tables(self.info, slots=slots, device=self._hooked.device)
        self._batch = make_batch(
            self._hooked,
            self._tables,
            batching,
            rows=rows,
            eos=end_tokens(model, tokenizer),
            prefill_tokens=prefill_tokens,
            chunk=chunk,
            cache_tokens=cache_tokens,
        )
        self._grammars = Grammars(tokenizer, vocab_size=self.info.vocab_size, ends=self._batch.eos)
        self._scheduler = Scheduler(self._batch, self._grammars)
        self._lora_runs = LoraRuns(self._scheduler, self._batch, self._grammars)
        self._mailboxes: WeakKeyDictionary[asyncio.AbstractEventLoop, Mailbox] = WeakKeyDictionary()
        self._proved = False
        self._proving = threading.Lock()
        refusal = self._hooked.map.head.refusal
        self.capabilities = Capabilities(
            engine="transformers",
            kinds=KINDS,
            sites=self.info.sites,
            sae_architectures=SUPPORTED,
            sampling=(*SAMPLING, "response_format") if self._grammars.offered else SAMPLING,
            captures=self.info.sites,
            # With autograd, prompts are padded on the right, which causal models alone allow.
            gradients=self._batch.causal,
            readouts=tuple(one for one in READOUTS if one != "kl" or self._finds_twins(rows)),
            lora=True,
            projections=tuple(site for site in PROJECTED_SITES if site in self.info.sites),
            carries=True,
            attention="head_out" in self.info.sites,
            no_unembedding=refusal.message if refusal is not None else None,
            roles=found_roles(tokenizer),
            limits={"slots": slots, "passes": MAX_RULES, "batch": rows},
        )

    def _finds_twins(self, rows: int) -> bool:
        """Whether requests can be compared with their unsteered twins: beside them, or, where
        sequences are put back one by one, behind them, by states that the head can read."""
        if self._batch.pairs:
            return rows > 1
        return self._hooked.map.head.refusal is None

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        name: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> TransformersEngine:
        """Loads a model: a name that Steer knows, a GGUF file, a folder, or a hub name.

        It runs in float32 on a CPU, in its own dtype on a GPU. `name` is what it is served as. What
        a known name stands for is fetched once, and a GGUF file converted once (`find_model`).
        Code that lies beside the weights is run only with `trust_remote_code`. Raises `SteerError`
        (`model_not_loaded`) for what transformers cannot load, and for a folder whose files are Git
        LFS pointers (`lfs_pointer`); `Unsupported` (`unsupported_model`) for a model that cannot be
        served exactly.
        """
        device = chosen_device(device)
        chosen = chosen_dtype(dtype, device)

        def loaded() -> TransformersEngine:
            found = find_model(model)
            check_model_folder(found.location)
            checkpoint, tokenizer = load_checkpoint(
                found.location, dtype=chosen, device=device, trust_remote_code=trust_remote_code
            )
            engine = cls(checkpoint, tokenizer, name=found.own_name, **options)
            engine.info = engine.info.served_as(name or found.name)
            return engine

        return apart(loaded)

    def start(self) -> None:
        """Starts the engine's thread and proves that steering acts; may be called again."""
        self._scheduler.start()
        with self._proving:
            if not self._proved:
                self._scheduler.run(self._batch.prove)
                self._proved = True

    def stop(self) -> None:
        self._scheduler.stop()
        self._hooked.remove()

    def __enter__(self) -> TransformersEngine:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def admit(self, request: GenerationRequest) -> None:
        """Raises where `request` can never run here."""
        check_request(request, self.info, self._batch.max_length)
        check_readouts(request, self.capabilities)
        check_lora(request, self.capabilities)
        if request.lora is not None:
            self._lora_runs.check(request.lora)
        if request.sampling.json_schema is not None:
            self._grammars.check(request.sampling.json_schema)
        if request.plan is not None:
            self._tables.check(request.plan)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        self.admit(request)
        refuse_lora(request)
        self.start()
        listener = AsyncListener(self._mailbox())
        ticket = self._scheduler.submit(request, listener)
        try:
            while True:
                item = await listener.queue.get()
                if isinstance(item, SteerError):
                    raise item
                yield item
                if item.finish:
                    return
        finally:
            ticket.cancel()

    def complete(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        for request in requests:
            self.admit(request)
        self.start()
        return by_adapter(requests, self._complete)

    def _complete(
        self, lora: Lora | None, requests: Sequence[GenerationRequest]
    ) -> list[Completion]:
        if lora is not None:
            return self._lora_runs.complete(lora, requests)
        listeners = [BlockingListener() for _ in requests]
        tickets = self._submitted(list(zip(requests, listeners, strict=True)))
        try:
            return [listener.result() for listener in listeners]
        finally:
            for ticket in tickets:
                ticket.cancel()

    def _submitted(self, requests: Sequence[Handed]) -> list[Submission]:
        return self._scheduler.submit_all(requests)

    def capture(self, request: CaptureRequest) -> list[Captured]:
        for point in request.points:
            self.info.check_point(point)
        check_attends(request, self.capabilities)
        self.start()
        return self._captured(request)

    def _captured(self, request: CaptureRequest) -> list[Captured]:
        return self._scheduler.run(lambda: capture_batch(self._batch, request))

    def unembed(self, states: Tensor) -> Tensor:
        self.start()
        return self._scheduler.run(lambda: self._hooked.unembed(states))

    def token_rows(self, tokens: Sequence[int]) -> Tensor:
        self.start()
        return self._scheduler.run(lambda: self._hooked.token_rows(tokens))

    def project(self, point: HookPoint, states: Tensor) -> Tensor:
        check_projection(point, self.info, self.capabilities)
        self.start()
        return self._scheduler.run(lambda: self._hooked.project(point, states))

    def carry(
        self,
        source: HookPoint,
        target: HookPoint,
        states: Tensor,
        channels: range | None = None,
    ) -> Tensor:
        check_carry(source, target, self.info, self.capabilities)
        self.start()
        made = self._scheduler.run(lambda: self._hooked.carry(source, target, states))
        return made if channels is None else made[:, channels.start : channels.stop]

    def queries_and_keys(self, layer: int, states: Tensor) -> QueriesKeys:
        check_scores(layer, self.info, self.capabilities)
        self.start()
        return self._scheduler.run(lambda: self._hooked.queries_and_keys(layer, states))

    def differentiate(self, work: Callable[[DifferentiableModel], Result]) -> Result:
        """The result of `work`, run with autograd between two steps."""

        def run() -> Result:
            with differentiating(self._hooked) as model:
                return work(model)

        self.start()
        return self._scheduler.run(run)

    def stats(self) -> EngineStats:
        figures = self._scheduler.figures
        return EngineStats(
            slots=self._tables.slots,
            slots_in_use=self._tables.in_use,
            requests_running=figures.running,
            requests_waiting=figures.waiting,
            slot_waits=figures.slot_waits,
            extra={"interlude_seconds": figures.interlude_seconds},
        )

    def _mailbox(self) -> Mailbox:
        loop = asyncio.get_running_loop()
        if loop not in self._mailboxes:
            self._mailboxes[loop] = Mailbox(loop)
        return self._mailboxes[loop]


def end_tokens(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """The ids that end an answer, by all that the model's files say of it."""
    config = getattr(model, "config", None)
    return ends.end_tokens(
        tokenizer,
        declared=[_eos(getattr(model, "generation_config", None))],
        supposed=[_eos(config), _eos(getattr(config, "text_config", None))],
    )


def _eos(config: Any) -> Any:
    return getattr(config, "eos_token_id", None)
