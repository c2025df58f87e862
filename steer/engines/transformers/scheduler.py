"""The engine's thread: takes requests, runs the batch, hands out tokens.

Everything that touches the model happens in this one thread: between two steps it admits waiting
requests, drops cancelled ones, and runs the jobs (captures, inspection) that were submitted.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias, TypeVar

import torch

from steer.engines.base import GenerationRequest
from steer.engines.listeners import Item, Listener
from steer.engines.transformers.grammar import Grammars
from steer.engines.transformers.sampling import Sampler
from steer.engines.transformers.sequences import (
    Batch,
    BatchSequence,
    ends_of,
    failure_of,
    is_last,
)
from steer.errors import EngineError, SteerError
from steer.readouts.readings import RequestReadouts

Result = TypeVar("Result")


@dataclass
class Submission:
    """A submitted request; `cancel` may be called from any thread, at any time."""

    request: GenerationRequest
    listener: Listener
    cancelled: bool = False
    waited: bool = False
    """Whether it has been counted as waiting for a slot."""

    def cancel(self) -> None:
        self.cancelled = True


Handed: TypeAlias = tuple[GenerationRequest, Listener]
"""A request, and who is told of its tokens."""

_InboxItem: TypeAlias = list[Submission] | Callable[[], None] | None
"""What the thread is handed: requests that come together, work between two steps, or its end."""


@dataclass
class Figures:
    """Counters for metrics."""

    slot_waits: int = 0
    waiting: int = 0
    running: int = 0
    interlude_seconds: float = 0.0
    """Time of the thread that went into `Scheduler.run`: captures, inspection, background jobs."""


class Scheduler:
    """Assumes: `batch` is used by nobody else.

    Guarantees: first come, first served; a request that finds no slot, or no room in the cache for
    all that it may generate, waits; what is wrong with one request ends that one alone; when a step
    fails, the requests in it fail with `EngineError` and the engine goes on; while requests run,
    jobs get no more of the thread's time than they do.
    """

    def __init__(self, batch: Batch, grammars: Grammars | None = None) -> None:
        self._batch, self._grammars = batch, grammars
        self._inbox: queue.SimpleQueue[_InboxItem] = queue.SimpleQueue()
        self._waiting: deque[Submission] = deque()
        self._jobs: deque[Callable[[], None]] = deque()
        self._owed = 0.0
        """Seconds that running requests have left of their share, before the next job."""
        self._tickets: dict[int, Submission] = {}
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._starting = threading.Lock()
        self.figures = Figures()

    def start(self) -> None:
        """Starts the thread unless it runs."""
        with self._starting:
            self._ensure_thread()

    def stop(self) -> None:
        """Lets the running requests finish, refuses the waiting ones, ends the thread."""
        with self._starting:
            if self._thread is not None:
                self._inbox.put(None)
                self._thread.join()
                self._thread = None

    def submit(self, request: GenerationRequest, listener: Listener) -> Submission:
        """Queues `request`; its tokens, or the reason why there are none, go to `listener`."""
        [submission] = self.submit_all([(request, listener)])
        return submission

    def submit_all(self, requests: Sequence[Handed]) -> list[Submission]:
        """Queues requests that the thread sees together: how they are batched does not depend on
        how fast they are handed over."""
        submissions = [Submission(request, listener) for request, listener in requests]
        self._send(submissions)
        return submissions

    def run(self, job: Callable[[], Result]) -> Result:
        """The result of `job`, run in the engine's thread between two steps, in its turn."""
        if threading.current_thread() is self._thread:
            return job()
        return self.begin(job).result()

    def begin(self, job: Callable[[], Result]) -> Future[Result]:
        """`job` as in `run`, without waiting for it. Assumes: who waits is in another thread."""
        future: Future[Result] = Future()

        def work() -> None:
            started = time.perf_counter()
            answer: Callable[[], None]
            try:
                self._batch.lend()
                answer = partial(future.set_result, job())
            except BaseException as error:
                answer = partial(future.set_exception, error)
            # Before the answer: who gets it may ask at once what it took.
            self.figures.interlude_seconds += time.perf_counter() - started
            answer()

        self._send(work)
        return future

    def _send(self, item: _InboxItem) -> None:
        # Under the lock of `stop`: an item behind the request to stop would never be answered.
        with self._starting:
            self._ensure_thread()
            self._inbox.put(item)

    def _ensure_thread(self) -> None:
        if self._thread is None:
            self._stopping = False
            self._thread = threading.Thread(target=self._loop, name="steer", daemon=True)
            self._thread.start()

    @torch.inference_mode()
    def _loop(self) -> None:
        while not (self._stopping and not self._batch.sequences):
            idle = not self._batch.sequences and not self._waiting and not self._jobs
            if idle:
                self._batch.lend()
            self._read_inbox(block=idle)
            self._run_job()
            self._drop_cancelled()
            started = time.perf_counter()
            touched: dict[int, Listener] = {}
            try:
                self._admit(touched)
                if self._batch.sequences:
                    self._hand_out(self._batch.decode(), touched)
            except Exception as error:
                self._fail_batch(error, touched)
            self._owed -= time.perf_counter() - started
            for listener in touched.values():
                listener.flush()
            self.figures.running = len(self._batch.sequences)
            self.figures.waiting = len(self._waiting)
        while self._jobs:
            self._jobs.popleft()()
        self._batch.lend()
        for submission in self._waiting:
            _refuse(submission, EngineError("the engine is stopping"))
        self._waiting.clear()

    def _read_inbox(self, block: bool) -> None:
        while True:
            try:
                item = self._inbox.get(block=block and not self._stopping)
            except queue.Empty:
                return
            block = False
            if item is None:
                self._stopping = True
            elif isinstance(item, list):
                self._waiting.extend(item)
            else:
                self._jobs.append(item)

    def _run_job(self) -> None:
        """The next job, unless requests run that are to have as long as the last one took: whoever
        asks for one after the other must not keep everybody else waiting."""
        if not self._jobs or (self._batch.sequences and self._owed > 0):
            return
        started = time.perf_counter()
        self._jobs.popleft()()
        self._owed = time.perf_counter() - started

    def _drop_cancelled(self) -> None:
        leaders = [s for s in self._batch.sequences if s.leads]
        for sequence in [s for s in leaders if self._tickets[id(s)].cancelled]:
            self._batch.leave(sequence)
            del self._tickets[id(sequence)]
        if any(submission.cancelled for submission in self._waiting):
            self._waiting = deque(t for t in self._waiting if not t.cancelled)

    def _admit(self, touched: dict[int, Listener]) -> None:
        newcomers: list[BatchSequence] = []
        while self._waiting and not self._stopping:
            submission = self._waiting[0]
            if not self._has_place(submission.request, newcomers):
                break
            plan = submission.request.plan
            if plan is not None and not self._batch.tables.can_acquire(plan):
                self.figures.slot_waits += not submission.waited
                submission.waited = True
                break
            self._waiting.popleft()
            try:
                newcomers += self._running(submission).together
            except Exception as error:
                _refuse(submission, failure_of(error))
        if newcomers:
            try:
                self._hand_out(self._batch.join(newcomers), touched)
            except Exception as error:
                self._fail_newcomers(newcomers, error, touched)
                raise

    def _fail_newcomers(
        self, newcomers: list[BatchSequence], error: Exception, touched: dict[int, Listener]
    ) -> None:
        """Fails those that the batch does not hold: not yet taken in, or already let go."""
        present = {id(s) for s in self._batch.sequences}
        for sequence in newcomers:
            if id(sequence) in present or id(sequence) not in self._tickets:
                continue
            if not sequence.tokens:
                for one in sequence.together:
                    self._batch.give_back(one.steered)
            listener = self._tickets.pop(id(sequence)).listener
            listener.fail(failure_of(error))
            touched[id(listener)] = listener

    def _running(self, submission: Submission) -> BatchSequence:
        request = submission.request
        schema, grammar = request.sampling.json_schema, None
        if schema is not None and self._grammars is not None:
            grammar = self._grammars.mask(schema, prompt_length=len(request.prompt))
        sampler = Sampler(
            request.sampling,
            self._batch.hooked.device,
            prompt=request.prompt,
            ends=ends_of(request.sampling, self._batch.eos),
            grammar=grammar,
        )
        sequence = BatchSequence(
            request,
            self._batch.take(request),
            sampler,
            self._limit(request),
            reads=None
            if request.readouts is None
            else RequestReadouts(request.readouts, len(request.prompt)),
        )
        if self._places(request) > 1:
            sequence.followed(self._batch.take(replace(request, plan=None)))
        self._tickets[id(sequence)] = submission
        return sequence

    def _has_place(self, request: GenerationRequest, newcomers: Sequence[BatchSequence]) -> bool:
        """Whether there is a place for it, and room for all that it may generate, beside those who
        run or come before it; who is alone has all the room there is."""
        places = self._places(request)
        if len(newcomers) + places > self._batch.free:
            return False
        if not newcomers and not self._batch.sequences:
            return True
        longest = len(request.prompt) + self._limit(request)
        return self._batch.fits([*(s.longest for s in newcomers), *[longest] * places])

    def _limit(self, request: GenerationRequest) -> int:
        """How many tokens it may generate."""
        return min(request.sampling.max_tokens, self._batch.max_length - len(request.prompt))

    def _places(self, request: GenerationRequest) -> int:
        """How many sequences of the batch a request is: one with a twin beside it is two."""
        compared = request.readouts is not None and request.readouts.kl
        return 2 if compared and self._batch.pairs else 1

    def _hand_out(
        self, items: list[tuple[BatchSequence, Item]], touched: dict[int, Listener]
    ) -> None:
        for sequence, item in items:
            submission = self._tickets[id(sequence)]
            if is_last(item):
                del self._tickets[id(sequence)]
            if submission.cancelled:
                continue
            if isinstance(item, SteerError):
                submission.listener.fail(item)
            else:
                submission.listener.put(item)
            touched[id(submission.listener)] = submission.listener

    def _fail_batch(self, error: Exception, touched: dict[int, Listener]) -> None:
        for sequence in (s for s in self._batch.clear() if s.leads):
            submission = self._tickets.pop(id(sequence))
            submission.listener.fail(failure_of(error))
            touched[id(submission.listener)] = submission.listener


def _refuse(submission: Submission, error: SteerError) -> None:
    submission.listener.fail(error)
    submission.listener.flush()
