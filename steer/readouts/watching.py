"""Detectors on a request: one number is read of each token, and what it means is decided here.

Decisions are made of the numbers in the order of their positions, wherever these were computed: in
what chunks, how often, and beside whom changes nothing. The first token of a sequence is not
watched (`FIRST_WATCHED`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from steer.artefacts.arming import ArmedDetector, ReadTokens
from steer.artefacts.detector import FIRST_WATCHED, Detector, ScoreWindow
from steer.artefacts.library import Library
from steer.errors import (
    EngineError,
    IncompatibleArtefact,
    SpecError,
    SteerError,
    Unsupported,
    pointer,
)
from steer.model import Capabilities, ModelInfo
from steer.readouts.plan import ReadoutPlan
from steer.readouts.readers import DetectorReader


@dataclass(frozen=True, eq=False)
class ArmedPlan:
    """One detector made ready for a request."""

    spec: ArmedDetector
    detector: Detector

    @cached_property
    def reader(self) -> DetectorReader:
        one = self.detector
        return DetectorReader(one.point, one.direction, one.bias, self.spec.name)

    @property
    def threshold(self) -> float:
        given = self.spec.threshold
        return self.detector.threshold if given is None else given


@dataclass(frozen=True, eq=False)
class WatchPlan:
    """What is read of a request: the read-outs of its `own`, and a number for each of `armed`."""

    own: ReadoutPlan | None = None
    armed: tuple[ArmedPlan, ...] = ()

    @property
    def stops(self) -> bool:
        """Whether a detector may end the answer."""
        return any(one.spec.action == "stop" for one in self.armed)

    @cached_property
    def readouts(self) -> ReadoutPlan | None:
        """What the engine reads: its own first, of all tokens that any of them needs."""
        if not self.armed:
            return self.own
        asked: set[ReadTokens] = {one.spec.tokens for one in self.armed}
        readers, fields = tuple(one.reader for one in self.armed), ()
        if self.own is None:
            return ReadoutPlan(readers, fields, _union(asked))
        tokens = _union({*asked, self.own.tokens})
        return ReadoutPlan((*self.own.readers, *readers), self.own.fields, tokens)

    def watch(self, prompt_length: int) -> Watch | None:
        """The watch over one sequence; None where nothing is armed."""
        return Watch(self, prompt_length) if self.armed else None


@dataclass
class DetectorTrace:
    """What one detector has said of one sequence so far."""

    armed: ArmedPlan
    window: ScoreWindow
    positions: tuple[int, int]
    fired_at: int | None = None
    score: float | None = None
    """The greatest pooled score."""

    def see(self, position: int, score: float) -> None:
        """Takes the score of the token at `position`, each once and in order."""
        first, end = self.positions
        if not first <= position < end:
            return
        pooled = self.window.push(score)
        if math.isnan(pooled):
            raise EngineError(
                f"the detector {self.armed.spec.name!r} has no number for the token at position "
                f"{position}, so the answer is withheld",
                code="readouts_missed",
            )
        self.score = pooled if self.score is None else max(self.score, pooled)
        if self.fired_at is None and pooled > self.armed.threshold:
            self.fired_at = position

    def stops_at(self, position: int) -> bool:
        """Whether it ends the answer with the token there."""
        return self.armed.spec.action == "stop" and self.fired_at == position

    def as_json(self) -> dict[str, Any]:
        """As the answer has it; `position` is where it fired first, `score` the greatest, null
        where no token was watched."""
        finite = self.score is not None and math.isfinite(self.score)
        return {
            "name": self.armed.spec.name,
            "action": self.armed.spec.action,
            "fired": self.fired_at is not None,
            "position": self.fired_at,
            "score": self.score if finite else None,
            "threshold": self.armed.threshold,
        }


@dataclass
class Watch:
    """The detectors of one sequence.

    Assumes: rows come by position, each once.
    Guarantees: what it says depends on the rows up to the position at which it stops, and on
    nothing behind that.
    """

    plan: WatchPlan
    prompt_length: int
    detections: tuple[DetectorTrace, ...] = field(init=False)
    stopped_at: int | None = None
    """The position of the last token that may be shown, once a detector has ended the answer."""

    def __post_init__(self) -> None:
        readouts = self.plan.readouts
        assert readouts is not None, "there are detectors"
        self._start = readouts.width - len(self.plan.armed)
        self.detections = tuple(
            DetectorTrace(one, one.detector.window(), _span(one.spec.tokens, self.prompt_length))
            for one in self.plan.armed
        )

    def see(self, rows: Iterable[tuple[int, Sequence[float]]]) -> bool:
        """Takes rows `(position, numbers)` of the plan's read-outs; whether the answer ends.

        Raises `EngineError` where a number is missing.
        """
        for position, numbers in rows:
            if self.stopped_at is not None:
                break
            if not numbers:
                continue  # a divergence alone
            for one, score in zip(self.detections, numbers[self._start :], strict=True):
                one.see(position, score)
            if any(one.stops_at(position) for one in self.detections):
                self.stopped_at = position
        return self.stopped_at is not None

    @property
    def fired(self) -> tuple[str, ...]:
        """The names of those that fired."""
        return tuple(d.armed.spec.name for d in self.detections if d.fired_at is not None)


def compile_armed(
    specs: Sequence[ArmedDetector], library: Library, model: ModelInfo, able: Capabilities
) -> tuple[ArmedPlan, ...]:
    """The detectors of a request, looked up and checked.

    Raises `SteerError` with a pointer relative to the list: for names that are not registered, do
    not fit the model or are armed twice, and for hook points whose states the engine cannot read.
    """
    found = []
    for index, spec in enumerate(specs):
        at = pointer(index, "name")
        if spec.name in {one.name for one in specs[:index]}:
            raise SpecError(
                f"the detector {spec.name!r} is armed twice: arm it once",
                param=at,
                code="duplicate_detector",
            )
        try:
            detector = library.detector(spec.name)
        except SteerError as error:
            raise error.at(at) from None
        _check_fits(spec.name, detector, model, able, at)
        found.append(ArmedPlan(spec, detector))
    return tuple(found)


def _check_fits(
    name: str, detector: Detector, model: ModelInfo, able: Capabilities, at: str
) -> None:
    point = detector.point
    model.check_point(point, param=at)
    if point.site not in able.captures:
        raise Unsupported(
            f"the {able.engine} engine reads no states at {point.site!r}, where the detector "
            f"{name!r} looks",
            code="unsupported_site",
            param=at,
        )
    width, own = detector.card.width, model.width(point.site)
    if width != own:
        raise IncompatibleArtefact(
            f"the detector {name!r} has width {width}; {point.site} of {model.name!r} has width "
            f"{own}: use one made for this model",
            code="wrong_width",
            param=at,
        )


def _union(asked: set[ReadTokens]) -> ReadTokens:
    return next(iter(asked)) if len(asked) == 1 else "all"


def _span(tokens: ReadTokens, prompt_length: int) -> tuple[int, int]:
    first, end = ReadoutPlan((), (), tokens).wanted(prompt_length)
    return max(first, FIRST_WATCHED), end
