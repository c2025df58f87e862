"""Scorers by their spelling, as commands and jobs name them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypeAlias
from urllib.parse import parse_qs, urldefrag, urlsplit

from steer.artefacts.control_vector import ControlVector
from steer.errors import SteerError
from steer.fit.measure.judge import FORMS, JudgeScorer, Scale
from steer.fit.measure.probe import ProbeScorer
from steer.fit.measure.scoring import (
    AnswerScorer,
    Scorer,
    function_scorer,
    regex_scorer,
    words_scorer,
)

KINDS = frozenset({"regex", "words", "files", "python", "probe", "judge"})
FindVector: TypeAlias = Callable[[str], ControlVector]

SPELLINGS = (
    "regex:PATTERN, words:a,b,c, words:@FILE, python:module:function, "
    "probe:VECTOR#layer=2&threshold=1.5 or judge:URL#model=NAME&question=TEXT"
)


def parse_scorer(
    text: str,
    vectors: FindVector | None = None,
    *,
    kinds: Collection[str] = KINDS,
    judge_key: str = "none",
) -> Scorer | AnswerScorer:
    """The scorer that `text` spells; `vectors` finds a probe's vector, `judge_key` is a judge's.

    `kinds` are those that may be named: `python` runs code, `words:@FILE` reads files (both are
    only for callers who may do so anyway: a server leaves out `python` and `files`), and `judge`
    makes this process send requests.

    `regex:PATTERN` · `words:a,b,c` or `words:@FILE` (one per line) · `python:module:function` ·
    `probe:VECTOR`, with `layer` and `threshold` after a `#` · `judge:URL#model=NAME&question=TEXT`,
    with `scale=0-10` for numbers. Values after a `#` are URL-encoded. Raises `SteerError`.
    """
    kind, _, rest = text.partition(":")
    wanted = "files" if kind == "words" and rest.startswith("@") else kind
    if wanted in KINDS and wanted not in kinds:
        raise SteerError(
            f"scorers of the kind {wanted!r} are not allowed here", code="invalid_scorer"
        )
    if kind == "regex" and rest:
        return regex_scorer(rest)
    if kind == "words" and rest:
        return words_scorer(_lines(rest[1:]) if rest.startswith("@") else rest.split(","))
    if kind == "python" and rest:
        return function_scorer(rest)
    if kind == "probe" and rest:
        return _probe(rest, vectors)
    if kind == "judge" and rest:
        return _judge(rest, judge_key)
    raise SteerError(f"{text!r} is not a scorer: write {SPELLINGS}", code="invalid_scorer")


def _probe(rest: str, vectors: FindVector | None) -> ProbeScorer:
    name, fragment = urldefrag(rest)
    options = _options(fragment, {"layer", "threshold"})
    if vectors is None:
        raise SteerError(
            f"there is no registry here to find the probe {name!r} in", code="invalid_scorer"
        )
    try:
        layer = int(options["layer"]) if "layer" in options else None
        threshold = float(options["threshold"]) if "threshold" in options else None
    except ValueError:
        raise SteerError(
            f"'layer' and 'threshold' of a probe are numbers; got {fragment!r}",
            code="invalid_scorer",
        ) from None
    return ProbeScorer.of(vectors(name), layer=layer, threshold=threshold)


def judge_place(text: str) -> tuple[str, str]:
    """URL and model of a judge, from `URL#model=NAME`; raises `SteerError`."""
    url, options = _judge_options(text, {"model"})
    return url, options["model"]


def _judge(rest: str, key: str) -> JudgeScorer:
    url, options = _judge_options(rest, {"model", "question"}, {"scale"})
    return JudgeScorer(url, options["model"], options["question"], _scale(options), api_key=key)


def _judge_options(
    text: str, needed: set[str], more: Collection[str] = ()
) -> tuple[str, dict[str, str]]:
    """A judge's URL, and what stands after '#'."""
    url, fragment = urldefrag(text)
    options = _options(fragment, {*needed, *more})
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
        raise SteerError(
            f"{url!r} is not the URL of a judge: write http://HOST/v1#"
            + "&".join(f"{name}=…" for name in sorted(needed)),
            code="invalid_scorer",
        )
    missing = sorted(needed - set(options))
    if missing:
        raise SteerError(f"a judge needs {' and '.join(missing)} after '#'", code="invalid_scorer")
    return url, options


def _scale(options: Mapping[str, str]) -> Scale:
    given = options.get("scale", "yes-no")
    for known in FORMS:
        if known == given:
            return known
    raise SteerError(
        f"{given!r} is no scale of a judge: use {' or '.join(FORMS)}", code="invalid_scorer"
    )


def _options(fragment: str, known: set[str]) -> dict[str, str]:
    found = {name: values[-1] for name, values in parse_qs(fragment).items()}
    unknown = sorted(set(found) - known)
    if unknown or (fragment and not found):
        raise SteerError(
            f"{fragment!r} has {', '.join(map(repr, unknown)) or 'no NAME=VALUE'} where "
            f"{' and '.join(sorted(known))} are known",
            code="invalid_scorer",
        )
    return found


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise SteerError(
            f"the word list {path!r} cannot be read: {error.strerror}", code="invalid_scorer"
        ) from error
