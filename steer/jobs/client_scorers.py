"""Scorers that a client may ask a server for: nothing that runs its code or reads its files.

Regular expressions of clients run with a time limit: one that backtracks without end would hold up
the whole server, because Python's own matcher cannot be interrupted.
"""

from __future__ import annotations

import regex

from steer.errors import SteerError, Unsupported
from steer.fit.measure.scorers import FindVector, parse_scorer
from steer.fit.measure.scoring import AnswerScorer, Score, Scorer, words_scorer

MATCH_SECONDS = 0.1
"""The time that one expression may take on one text."""

_MAX_LENGTH = 1024


def client_scorer(
    text: str, vectors: FindVector | None = None, *, param: str = "/score"
) -> Scorer | AnswerScorer:
    """`regex:PATTERN`, `words:a,b,c` or `probe:VECTOR`; `vectors` finds a probe's vector.

    Raises `SteerError` for anything else.
    """
    kind, _, rest = text.partition(":")
    if kind in ("python", "judge") or (kind == "words" and rest.startswith("@")):
        what = {"python": "runs code of", "judge": "sends requests from"}.get(
            kind, "reads a file of"
        )
        raise Unsupported(
            f"{text[:60]!r} {what} the server, which clients may not ask for: use regex:PATTERN, "
            "words:a,b,c or probe:VECTOR, or the command line on the machine itself",
            param=param,
            code="scorer_refused",
        )
    try:
        if kind == "regex" and rest:
            return _regex_scorer(rest)
        if kind == "words" and rest:
            return words_scorer(rest.split(","))
        if kind == "probe" and rest:
            return parse_scorer(text, vectors, kinds=("probe",))
    except SteerError as error:
        raise error.at(param) from None
    raise SteerError(
        f"{text[:60]!r} is not a scorer: write regex:PATTERN, words:a,b,c or probe:VECTOR",
        param=param,
        code="invalid_scorer",
    )


def _regex_scorer(pattern: str) -> Scorer:
    if len(pattern) > _MAX_LENGTH:
        raise SteerError(
            f"the expression has {len(pattern)} characters and may have {_MAX_LENGTH}",
            code="invalid_scorer",
        )
    try:
        compiled = regex.compile(pattern, regex.IGNORECASE)
    except regex.error as error:
        raise SteerError(
            f"{pattern[:60]!r} is not a regular expression: {error}", code="invalid_scorer"
        ) from None

    def score(text: str) -> Score:
        try:
            found = compiled.search(text, timeout=MATCH_SECONDS)
        except TimeoutError:
            raise SteerError(
                f"the expression {pattern[:60]!r} takes more than {MATCH_SECONDS} s on one answer: "
                "write it without nested repetition",
                param="/score",
                code="scorer_too_slow",
            ) from None
        return Score(float(found is not None))

    return score
