"""What a model has said and read so far, in a file: long work that was ended goes on from there."""

from __future__ import annotations

import base64
import glob
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, cast

import safetensors.torch
from pydantic import BaseModel
from torch import Tensor

from steer.engines.base import (
    Captured,
    CaptureRequest,
    Completion,
    Engine,
    GenerationRequest,
    TokenLogprob,
)
from steer.errors import StorageError
from steer.plan.plan import SteeringPlan
from steer.prompts.roles import RoleRanges
from steer.registry.location import cache_folder

_BOOKMARK = ".bookmark-"
"""Between a journal's name and the rest of those of its bookmarks."""


class Remembering(Protocol):
    """An engine that remembers what was worked out with it."""

    def recall(self, what: Any, work: Callable[[], Tensor]) -> Tensor:
        """As `remembered`."""


def remembered(engine: Engine, what: Any, work: Callable[[], Tensor]) -> Tensor:
    """The result of `work`, or, from an engine that was asked before for the same `what` (plain
    values), what came out then.

    For small results of many readings, on which later work depends to the bit: where they were
    worked out anew, in other batches, nothing that follows would be known any more.
    """
    if not hasattr(engine, "recall"):
        return work()
    return cast("Remembering", engine).recall(what, work)


def bookmark_of(engine: Engine, what: Any) -> Path | None:
    """The file in which work on `engine` may keep how far it has got; None: nowhere. `what`
    (plain values) is what the work depends on; its files go with the journal's."""
    return engine.bookmark(what) if hasattr(engine, "bookmark") else None


def remembering(engine: Engine) -> Engine:
    """`engine`, or one over it that does not ask twice for the same."""
    return engine if hasattr(engine, "recall") else JournaledEngine(engine)


def journal_of(request: BaseModel, engine: Engine, *more: Any) -> Path:
    """Where the work for `request` on this model is written down, in the user's cache; `more`
    plain values are what else it depends on."""
    what = [request.model_dump(mode="json"), *more, _identity(engine)]
    folder = cache_folder() / "making"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{_digest(what)[:16]}.jsonl"


def forget(journal: Path) -> None:
    """Removes a journal and the bookmarks beside it, where they are."""
    journal.unlink(missing_ok=True)
    for one in _bookmarks(journal):
        one.unlink(missing_ok=True)


class JournaledEngine:
    """An engine that remembers, in the file `path` (None: for as long as it lives), its answers,
    the log-probabilities that it read, and what is `remembered`; states and logits are read anew.

    Guarantees: a file of another engine, model or release is begun anew; a line that was cut off by
    a crash is passed over; what is drawn anew each time is asked anew (`_repeatable`). The file is
    there once there is something in it. Answers have no receipts.
    """

    def __init__(self, engine: Engine, path: Path | None = None) -> None:
        self.engine = engine
        self.info, self.capabilities = engine.info, engine.capabilities
        self.tokenizer = engine.tokenizer
        self._path = path
        self._identity = _digest(_identity(engine))
        known = {} if path is None else _lines(path)
        self._known = known if known.pop("engine", None) == self._identity else {}

    @property
    def begun(self) -> bool:
        """Whether anything is remembered."""
        return bool(self._known) or (self._path is not None and any(_bookmarks(self._path)))

    def complete(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        keys = [_answer_key(one) if _repeatable(one) else None for one in requests]
        missing = [n for n, key in enumerate(keys) if key is None or key not in self._known]
        asked = self.engine.complete([requests[n] for n in missing]) if missing else []
        fresh = dict(zip(missing, asked, strict=True))
        if missing:
            self._write((key, _plain(fresh[n])) for n in missing if (key := keys[n]) is not None)
        return [
            fresh[n] if key is None else _completion(*self._known[key])
            for n, key in enumerate(keys)
        ]

    def capture(self, request: CaptureRequest) -> list[Captured]:
        if (
            request.points
            or request.attention
            or request.logits != "none"
            or request.logprobs is None
        ):
            return self.engine.capture(request)
        plans = request.plans or [None] * len(request.prompts)
        roles = request.roles or [None] * len(request.prompts)
        rest = [request.logprobs, request.tail]
        keys = [
            _key("reading", prompt, plan, whose, rest)
            for prompt, plan, whose in zip(request.prompts, plans, roles, strict=True)
        ]
        missing = [n for n, key in enumerate(keys) if key not in self._known]
        if missing:
            found = self.engine.capture(request.of(missing))
            self._write(
                (keys[n], [list(_entry(x)) for x in one.logprobs])
                for n, one in zip(missing, found, strict=True)
            )
        return [Captured({}, None, _logprobs(self._known[key])) for key in keys]

    def recall(self, what: Any, work: Callable[[], Tensor]) -> Tensor:
        """See `remembered`; without a file nobody asks a second time, and nothing is held."""
        if self._path is None:
            return work()
        key = _digest(["result", what])[:32]
        if key not in self._known:
            data = safetensors.torch.save({"found": work().contiguous()})
            self._write([(key, base64.b64encode(data).decode())])
        return safetensors.torch.load(base64.b64decode(self._known[key]))["found"]

    def bookmark(self, what: Any) -> Path | None:
        """See `bookmark_of`; another engine, model or release has another file."""
        if self._path is None:
            return None
        key = _digest(["bookmark", what, self._identity])[:16]
        return self._path.with_name(f"{self._path.name}{_BOOKMARK}{key}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def _write(self, entries: Iterable[tuple[str, Any]]) -> None:
        if self._path is None:
            self._known.update(entries)
            return
        try:
            with self._path.open("a" if self._known else "w", encoding="utf-8") as file:
                if not self._known:
                    file.write(json.dumps(["engine", self._identity]))
                for key, value in entries:
                    self._known[key] = value
                    # The line's end comes first: what a crash cut off spoils no line after it.
                    file.write("\n" + json.dumps([key, value]))
        except OSError as error:
            # Without its folder: a client may read this.
            raise StorageError(
                f"what the model said cannot be kept in {self._path.name!r}: {error.strerror}; "
                "make room on the disk, or let it be written"
            ) from error


def _bookmarks(journal: Path) -> Iterator[Path]:
    return journal.parent.glob(f"{glob.escape(journal.name)}{_BOOKMARK}*")


def _repeatable(request: GenerationRequest) -> bool:
    """Whether the same request would get the same answer, all of which the key tells."""
    sampling = request.sampling
    drawn = sampling.temperature > 0 and sampling.seed is None
    return not drawn and request.stop is None and not request.measure


def _identity(engine: Engine) -> list[Any]:
    """What another run must have in common for its answers to be the same."""
    return [engine.capabilities.engine, asdict(engine.info), version("steer-llm")]


def _answer_key(request: GenerationRequest) -> str:
    sampling = asdict(request.sampling)
    rest = sampling if request.lora is None else [sampling, request.lora.sha256]
    return _key("answer", request.prompt, request.plan, request.roles, rest)


def _key(
    what: str,
    prompt: Sequence[int],
    plan: SteeringPlan | None,
    roles: RoleRanges | None,
    rest: Any,
) -> str:
    asked = [what, list(prompt), None if plan is None else plan.fingerprint, rest]
    if roles is not None and plan is not None and plan.reads_roles:
        asked.append(roles.ranges)
    return _digest(asked)[:32]


def _digest(what: Any) -> str:
    # Sets of tokens are the one thing in requests that is no JSON.
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=sorted).encode()).hexdigest()


def _lines(path: Path) -> dict[str, Any]:
    known = {}
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            key, value = json.loads(line)
        except ValueError:
            continue
        known[key] = value
    return known


def _plain(one: Completion) -> list[Any]:
    return [list(one.tokens), one.finish, [list(_entry(x)) for x in one.logprobs]]


def _entry(one: TokenLogprob) -> tuple[Any, ...]:
    return (one.logprob, one.top) if one.top else (one.logprob,)


def _logprobs(entries: Sequence[Sequence[Any]]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(logprob, tuple((token, value) for token, value in (top[0] if top else ())))
        for logprob, *top in entries
    )


def _completion(tokens: list[int], finish: Any, logprobs: list[Any]) -> Completion:
    return Completion(tuple(tokens), finish, None, _logprobs(logprobs))
