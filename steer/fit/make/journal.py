"""What a model has said and read so far, in a file: long work that was ended goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from steer.engines.base import (
    Captured,
    CaptureRequest,
    Completion,
    Engine,
    GenerationRequest,
    TokenLogprob,
)
from steer.errors import SteerError
from steer.plan.plan import SteeringPlan
from steer.registry.location import cache_folder


def journal_of(request: BaseModel, engine: Engine, dtype: str) -> Path:
    """Where the work for `request` on this model is written down, in the user's cache."""
    what = [request.model_dump(mode="json"), asdict(engine.info), dtype, version("steer-llm")]
    name = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]
    folder = cache_folder() / "making"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.jsonl"


class JournaledEngine:
    """An engine that remembers, in the file `path`, its answers and the log-probabilities that it
    read; states and logits are read anew.

    Assumes: the engine is the same as when the file was written, which is what its folder is named
    for. Guarantees: a line that was cut off by a crash is passed over.
    """

    def __init__(self, engine: Engine, path: Path) -> None:
        self.engine = engine
        self.info, self.capabilities = engine.info, engine.capabilities
        self.tokenizer = engine.tokenizer
        self._path = path
        self._known = _lines(path)

    def complete(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        keys = [_key("answer", one.prompt, one.plan, asdict(one.sampling)) for one in requests]
        missing = [n for n, key in enumerate(keys) if key not in self._known]
        if missing:
            found = self.engine.complete([requests[n] for n in missing])
            self._write(
                (keys[n], [list(one.tokens), one.finish, [x.logprob for x in one.logprobs]])
                for n, one in zip(missing, found, strict=True)
            )
        return [_completion(*self._known[key]) for key in keys]

    def capture(self, request: CaptureRequest) -> list[Captured]:
        if request.points or request.logits != "none" or request.logprobs != 0:
            return self.engine.capture(request)
        plans = request.plans or [None] * len(request.prompts)
        keys = [
            _key("reading", tuple(prompt), plan, request.tail)
            for prompt, plan in zip(request.prompts, plans, strict=True)
        ]
        missing = [n for n, key in enumerate(keys) if key not in self._known]
        if missing:
            fewer = replace(
                request,
                prompts=[request.prompts[n] for n in missing],
                plans=None if request.plans is None else [plans[n] for n in missing],
            )
            found = self.engine.capture(fewer)
            self._write(
                (keys[n], [x.logprob for x in one.logprobs])
                for n, one in zip(missing, found, strict=True)
            )
        return [Captured({}, None, tuple(map(TokenLogprob, self._known[key]))) for key in keys]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def _write(self, entries: Any) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                for key, value in entries:
                    self._known[key] = value
                    file.write(json.dumps([key, value]) + "\n")
        except OSError as error:
            raise SteerError(
                f"{str(self._path)!r} cannot be written: {error.strerror}", code="not_written"
            ) from error


def _key(what: str, prompt: Sequence[int], plan: SteeringPlan | None, rest: Any) -> str:
    plain = [what, list(prompt), None if plan is None else plan.fingerprint, rest]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _lines(path: Path) -> dict[str, Any]:
    known = {}
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            key, value = json.loads(line)
        except ValueError:
            continue
        known[key] = value
    return known


def _completion(tokens: list[int], finish: Any, logprobs: list[float]) -> Completion:
    return Completion(tuple(tokens), finish, None, tuple(map(TokenLogprob, logprobs)))
