"""Two ways to run vLLM's engine: in this process on a thread of its own, or through a client.

The first is `LLM` and the tests: one process, steps in a known order. The second is vLLM's server,
whose engine runs elsewhere and is reached from the server's event loop.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol

from steer.engines.vllm.front.ranks import ask_engines
from steer.engines.vllm.front.sequences import RunningSequence, vllm_sampling
from steer.engines.vllm.front.twins import Twin, TwinListener, TwinMaker, compared
from steer.engines.vllm.messages import leaves_unsteered
from steer.engines.vllm.pipeline import gathered_answers, merged_answers, readout_answers
from steer.errors import EngineError, SteerError


class Driver(Protocol):
    """Runs sequences to their end. Methods are called from any thread but the driver's own."""

    def compare_with(self, twins: TwinMaker) -> None:
        """Says how the twins are made of requests that ask for `kl`; called once, before any."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def submit(self, sequences: Iterable[RunningSequence]) -> None:
        """Runs `sequences`; events, or the reason why there are none, go to their listeners."""

    def cancel(self, sequence: RunningSequence) -> None:
        """Ends a sequence that may or may not be running."""

    def rpc(self, method: str, *args: Any) -> list[list[Any]]:
        """The answers of the workers of each engine to a call between two steps."""


class _Stepper:
    """Steps an `LLMEngine` of this process, always in the same thread, and follows sequences.

    Assumes: nobody else steps the engine while sequences run here.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.twins: TwinMaker | None = None
        """What the requests are compared with that ask for it."""
        self._running: dict[str, RunningSequence] = {}
        self._compared: dict[str, RunningSequence] = {}
        """The twins that run, by the key of whom they follow."""

    @property
    def busy(self) -> bool:
        return bool(self.engine.has_unfinished_requests())

    def add(self, sequences: Iterable[RunningSequence]) -> None:
        for sequence in sequences:
            prompt = {"prompt_token_ids": list(sequence.request.prompt)}
            params = vllm_sampling(sequence)
            try:
                self.engine.add_request(sequence.key, prompt, params, **sequence.adapter)
            except Exception as error:
                sequence.fail(error)
            else:
                self._running[sequence.key] = sequence

    def abort(self, sequence: RunningSequence) -> None:
        twin = self._compared.pop(sequence.key, None)
        known = [one for one in (sequence, twin) if one and self._running.pop(one.key, None)]
        if known:
            self.engine.abort_request([one.key for one in known])
            self._tell_ends()
            self._drop(sequence, twin)

    def _drop(self, sequence: RunningSequence, twin: RunningSequence | None = None) -> None:
        """Lets the workers forget what nobody will fetch."""
        if sequence.leaves_readouts:
            self.engine.collective_rpc("steer_readouts", args=([sequence.dropped_readouts],))
        if twin is not None:
            self.engine.collective_rpc("steer_captured", args=([twin.asked[0]],))

    def step(self) -> None:
        """One step; when it fails, so do the sequences in it, and those that it has ended."""
        ended: list[RunningSequence] = []
        try:
            self._step(ended)
        except Exception as error:
            failure = EngineError(f"vLLM's step failed: {error!r}")
            self.fail(failure)
            for sequence in ended:
                sequence.fail(failure)

    def fail(self, error: SteerError) -> None:
        keys = list(self._running)
        if keys:
            self.engine.abort_request(keys)
        for sequence in self._running.values():
            sequence.fail(error)
        self._running.clear()
        self._compared.clear()

    def _step(self, ended: list[RunningSequence]) -> None:
        """`ended` are those that wait for their receipts."""
        told = []
        for output in self.engine.step():
            sequence = self._running.get(output.request_id)
            if sequence is not None:
                sequence.take(output)
                told.append((sequence, output))
        self._read([sequence for sequence, _ in told if sequence.wants_readouts])
        for sequence, output in told:
            if sequence.key not in self._running:
                continue
            if sequence.finish is None:
                sequence.listener.flush()
                continue
            ended.append(self._running.pop(sequence.key))
            if not output.finished:
                self.engine.abort_request([sequence.key])
        self._tell_ends()
        self._close(ended)

    def _read(self, sequences: Sequence[RunningSequence]) -> None:
        """Fetches what was read of `sequences` with one call; one whose read-outs were not made
        ends here."""
        if not sequences:
            return
        asked = [sequence.asked_readouts for sequence in sequences]
        found = readout_answers([self.engine.collective_rpc("steer_readouts", args=(asked,))])
        for sequence, answers in zip(sequences, found, strict=True):
            try:
                sequence.read(answers.get(0, ()))
            except SteerError as error:
                self.abort(sequence)
                sequence.fail(error)

    def _tell_ends(self) -> None:
        """Lets the workers hear of the last requests' end, which comes with the next schedule.

        An engine core in a process of its own steps by itself until they have; here it would
        wait for an output that never comes.
        """
        if not self.busy and hasattr(self.engine.engine_core, "engine_core"):
            self.engine.step()

    def _close(self, ended: list[RunningSequence]) -> None:
        """Fetches the receipts of all that ended in this step with one call."""
        steered = [sequence for sequence in ended if sequence.wants_receipt]
        answers: dict[int, Any] = {}
        if steered:
            asked = [sequence.asked for sequence in steered]
            found = merged_answers(self.engine.collective_rpc("steer_receipts", args=(asked,)))
            answers = {id(one): answer[0] for one, answer in zip(steered, found, strict=True)}
        if any(map(leaves_unsteered, answers.values())):
            self.engine.reset_prefix_cache()
        while ended:
            sequence = ended.pop()
            answer = answers.get(id(sequence))
            if sequence.wants_twin and "error" not in (answer or {}):
                self._follow(sequence, answer)
            else:
                sequence.close(answer)

    def _follow(self, sequence: RunningSequence, receipt: Any) -> None:
        """Runs the twin of a sequence that has ended, which waits for it with its `receipt`."""
        twin = _twin_of(sequence, self.twins)

        def failed(error: SteerError) -> None:
            self._compared.pop(sequence.key, None)
            sequence.fail(error)

        def done() -> None:
            self._compared.pop(sequence.key, None)
            answers = self.engine.collective_rpc("steer_divergences", args=([twin.asked],))
            try:
                sequence.compare(twin.read(one for worker in answers for one in worker))
            except SteerError as error:
                sequence.fail(error)
            else:
                sequence.close(receipt)

        running = twin.running(TwinListener(done, failed))
        self._compared[sequence.key] = running
        self.add([running])


def _twin_of(sequence: RunningSequence, twins: TwinMaker | None) -> Twin:
    if twins is None or sequence.ticket is None:
        raise AssertionError("who is compared has a ticket, and an engine makes its twin")
    return twins.of(sequence.ticket.key, 0, sequence.request.prompt, sequence.said)


class InlineDriver:
    """Drives an `LLM` that somebody else made, in the thread of the caller: `submit` returns when
    its sequences have ended."""

    def __init__(self, llm: Any) -> None:
        self._stepper = _Stepper(llm.llm_engine)

    def compare_with(self, twins: TwinMaker) -> None:
        self._stepper.twins = twins

    def start(self) -> None:
        """Nothing runs by itself."""

    def stop(self) -> None:
        """The engine belongs to its maker."""

    def submit(self, sequences: Iterable[RunningSequence]) -> None:
        self._stepper.add(sequences)
        while self._stepper.busy:
            self._stepper.step()

    def cancel(self, sequence: RunningSequence) -> None:
        self._stepper.abort(sequence)

    def rpc(self, method: str, *args: Any) -> list[list[Any]]:
        return [list(self._stepper.engine.collective_rpc(method, args=args))]


class LocalDriver:
    """Makes an `LLM` in a thread of its own and drives it there.

    In that thread, because vLLM on a CPU counts and binds the OpenMP threads of the thread that
    made it, and refuses to compute in another one.
    """

    def __init__(self, make_llm: Callable[[], Any]) -> None:
        """Returns when the model is loaded; raises what `make_llm` raises."""
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._made: Future[Any] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(make_llm,), name="steer-vllm", daemon=True
        )
        self._thread.start()
        self.llm = self._made.result()
        self._stepper = _Stepper(self.llm.llm_engine)

    def compare_with(self, twins: TwinMaker) -> None:
        self._stepper.twins = twins

    def start(self) -> None:
        """The thread runs already."""

    def stop(self) -> None:
        self._inbox.put(None)
        self._thread.join()

    def submit(self, sequences: Iterable[RunningSequence]) -> None:
        self._inbox.put(lambda: self._stepper.add(sequences))

    def cancel(self, sequence: RunningSequence) -> None:
        self._inbox.put(lambda: self._stepper.abort(sequence))

    def rpc(self, method: str, *args: Any) -> list[list[Any]]:
        future: Future[list[list[Any]]] = Future()

        def work() -> None:
            try:
                future.set_result([list(self.llm.collective_rpc(method, args=args))])
            except BaseException as error:
                future.set_exception(error)

        self._inbox.put(work)
        return future.result()

    def _run(self, make_llm: Callable[[], Any]) -> None:
        try:
            self._made.set_result(make_llm())
        except BaseException as error:
            self._made.set_exception(error)
            return
        job = self._inbox.get()
        while job is not None:
            job()
            while self._inbox.empty() and self._stepper.busy:
                self._stepper.step()
            job = self._inbox.get()
        self._stepper.fail(EngineError("the engine was stopped", code="engine_stopped"))
        # vLLM's own processes would otherwise stay as long as this one does.
        self.llm.llm_engine.engine_core.shutdown()


class ClientDriver:
    """Drives vLLM's `EngineClient` from the event loop that it belongs to."""

    def __init__(self, client: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._client, self._loop = client, loop
        # Taken now: a server may put its own generation in front of the client's later.
        self._generate = client.generate
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._twins: TwinMaker | None = None

    def compare_with(self, twins: TwinMaker) -> None:
        self._twins = twins

    def start(self) -> None:
        """The client runs already."""

    def stop(self) -> None:
        """The client is stopped by its server."""

    def submit(self, sequences: Iterable[RunningSequence]) -> None:
        self._loop.call_soon_threadsafe(self._start, sequences)

    def cancel(self, sequence: RunningSequence) -> None:
        self._loop.call_soon_threadsafe(self._stop, sequence)

    def rpc(self, method: str, *args: Any) -> list[list[Any]]:
        call = ask_engines(self._client, method, *args)
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()

    def _start(self, sequences: Iterable[RunningSequence]) -> None:
        for sequence in sequences:
            task = self._loop.create_task(self._serve(sequence))
            self._tasks[sequence.key] = task
            task.add_done_callback(partial(self._forget, sequence.key))

    def _forget(self, key: str, _: asyncio.Task[Any]) -> None:
        self._tasks.pop(key, None)

    def _stop(self, sequence: RunningSequence) -> None:
        task = self._tasks.pop(sequence.key, None)
        if task is not None:
            task.cancel()

    async def _serve(self, sequence: RunningSequence) -> None:
        prompt = {"prompt_token_ids": list(sequence.request.prompt)}
        params, fetched = vllm_sampling(sequence), False
        try:
            outputs = self._generate(prompt, params, sequence.key, **sequence.adapter)
            async for output in outputs:
                sequence.take(output)
                if sequence.wants_readouts:
                    asked = [sequence.asked_readouts]
                    answers = await ask_engines(self._client, "steer_readouts", asked)
                    sequence.read(readout_answers(answers)[0].get(0, ()))
                if sequence.finish is not None:
                    break
                sequence.listener.flush()
            await outputs.aclose()
            answer = None
            if sequence.wants_receipt:
                found = await ask_engines(self._client, "steer_receipts", [sequence.asked])
                answer = gathered_answers(found)[0][0]
            if sequence.wants_twin and "error" not in (answer or {}):
                twin = _twin_of(sequence, self._twins)
                sequence.compare(await compared(self._client, self._generate, twin))
            fetched = True
            sequence.close(answer)
        except Exception as error:
            sequence.fail(error)
        finally:
            if sequence.leaves_readouts and not fetched:
                drop = ask_engines(self._client, "steer_readouts", [sequence.dropped_readouts])
                self._tasks[f"drop {sequence.key}"] = task = self._loop.create_task(drop)
                task.add_done_callback(partial(self._forget, f"drop {sequence.key}"))
