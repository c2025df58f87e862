"""Every error Steer raises on purpose.

    SteerError
    ├── SpecError              the steering spec itself is wrong
    ├── UnknownArtefact        a name or hash that the registry does not hold
    ├── UnknownModel           a model or profile that is not served
    ├── IncompatibleArtefact   an artefact that does not fit this model (width, layer, model)
    ├── Unsupported            a correct request that this engine cannot honour
    ├── NotFinite              steering drove the model's numbers beyond what they can hold
    ├── FileFormatError        bytes that are not what they claim to be
    ├── TooLarge               over a configured limit
    ├── Conflict               would overwrite something that must not change
    ├── CapacityError          no slot, row or queue place is free at the moment
    ├── EngineError            the engine failed while running a request
    └── StorageError           the registry's own folder or catalogue failed

Each error carries a stable `code`, the `param` it concerns (an RFC 6901 JSON pointer into the
request, or None), and an HTTP `status` so that every front end answers alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import Repr
from typing import Any

LONGEST_MESSAGE = 2000
LONGEST_PARAM = 300
"""Characters of an error that quotes what a caller sent, however long that was."""


def clipped(text: str, limit: int = LONGEST_MESSAGE) -> str:
    """`text`, without its middle where it is longer than `limit`: what it says, and what to do."""
    if len(text) <= limit:
        return text
    tail = limit // 4
    return f"{text[: limit - tail - 1]}…{text[-tail:]}"


def clipped_pointer(param: str | None) -> str | None:
    """A JSON pointer no longer than an error has room for."""
    return None if param is None else clipped(param, LONGEST_PARAM)


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a request: what, where, and under which stable code."""

    message: str
    code: str
    param: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", clipped(self.message))
        object.__setattr__(self, "param", clipped_pointer(self.param))


class SteerError(Exception):
    """Root of the tree; `str(error)` is a sentence that says what to do."""

    code = "steer_error"
    status = 400

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        message = clipped(message)
        super().__init__(message)
        self.message = message
        self.param = clipped_pointer(param)
        if code is not None:
            self.code = code

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The problems behind this error: one, unless several were collected."""
        return (Problem(self.message, self.code, self.param),)

    def at(self, pointer: str) -> SteerError:
        """The same error, its `param` set to `pointer` where it had none."""
        if self.param is None:
            self.param = clipped_pointer(pointer)
        return self


class SpecError(SteerError):
    """The steering spec is malformed or contradicts itself."""

    code = "invalid_spec"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        problems: Sequence[Problem] = (),
    ) -> None:
        super().__init__(message, param=param, code=code)
        self._problems = tuple(problems)

    @property
    def problems(self) -> tuple[Problem, ...]:
        return self._problems or super().problems


class UnknownArtefact(SteerError):
    """A vector, SAE, adapter or profile that is not registered.

    What an address names is not found, 404; what a request's body names is a wrong field, 400. A
    proxy takes a 404 for a missing deployment, and would send everybody else's requests elsewhere.
    """

    code = "unknown_artefact"

    @property
    def status(self) -> int:  # type: ignore[override]
        return 404 if self.param is None else 400


class UnknownModel(SteerError):
    """The model that a request asks for is none of this server's: OpenAI's clients know the 404."""

    code = "model_not_found"
    status = 404


class IncompatibleArtefact(SteerError):
    """An artefact whose width, layers or model do not fit the model being served."""

    code = "incompatible_artefact"


class Unsupported(SteerError):
    """A valid request that this engine, model or version cannot honour."""

    code = "unsupported"


class NotFinite(SteerError):
    """Edits that, alone or in the model, overflow: there is nothing left to answer from."""

    code = "not_finite"


class FileFormatError(SteerError):
    """A file that is truncated, lies about itself, or is of no known format."""

    code = "invalid_file"


class TooLarge(SteerError):
    """More bytes, rows or tokens than the configured limit allows."""

    code = "too_large"
    status = 413


class Conflict(SteerError):
    """The change would break something that refers to the present state."""

    code = "conflict"
    status = 409


class CapacityError(SteerError):
    """Nothing is wrong with the request; there is no room for it now, or a model that would have to
    be asked does not answer."""

    code = "at_capacity"
    status = 503


class EngineError(SteerError):
    """The engine failed; the request may be tried again."""

    code = "engine_error"
    status = 500


class StorageError(SteerError):
    """The registry could not read or write its own files: full disk, damaged blob, no access."""

    code = "storage_error"
    status = 500


def pointer(*parts: str | int) -> str:
    """An RFC 6901 JSON pointer: `pointer("interventions", 0)` is `/interventions/0`."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def quoted(value: Any, limit: int = 60) -> str:
    """`value` as an error quotes it: its repr, cut after `limit` characters.

    Neither a long value nor a deep one costs more than a short one.
    """
    short = Repr()
    short.maxlevel = 3
    short.maxstring = short.maxother = short.maxlong = limit
    short.maxlist = short.maxtuple = short.maxdict = short.maxset = limit // 4
    text = short.repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
