"""Where another model is reached: an OpenAI-compatible server, by URL.

Only the URL that a person has put on the command line or an operator into the settings is called.
A client of the server names no URL, is told none, and a server that answers with a redirection is
not followed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urldefrag, urlsplit

from steer.errors import SteerError
from steer.fit.measure.judge import asking

if TYPE_CHECKING:
    from openai import OpenAI

log = logging.getLogger("steer.asked")


@dataclass(frozen=True)
class OutsideModel:
    """The model `model` of the server at `url`.

    `hidden` is whether the URL stays with the operator: errors then name neither it nor what the
    server said, either of which may hold a secret.
    """

    url: str
    model: str
    api_key: str = field(default="none", repr=False)
    hidden: bool = False

    @staticmethod
    def at(place: str, api_key: str | None = None, *, hidden: bool = False) -> OutsideModel:
        """From `http://HOST/v1#model=NAME`; raises `SteerError` (`invalid_option`)."""
        url, fragment = urldefrag(place)
        split, options = urlsplit(url), dict(parse_qsl(fragment))
        if split.scheme not in ("http", "https") or not split.hostname:
            raise SteerError(
                "this is not the URL of a model: write http://HOST/v1#model=NAME",
                code="invalid_option",
            )
        if split.username is not None or split.password is not None:
            raise SteerError(
                "a key does not belong into the URL of a model, which others may see: put it into "
                "the variable for keys",
                code="invalid_option",
            )
        if set(options) != {"model"}:
            raise SteerError(
                "the URL of a model ends with #model=NAME, and with nothing else",
                code="invalid_option",
            )
        return OutsideModel(url, options["model"], api_key or "none", hidden)


@contextmanager
def outside_client(
    outside: OutsideModel,
    *,
    what: str,
    error: type[SteerError] = SteerError,
    retries: int,
    timeout: float,
    parallel: int,
) -> Iterator[tuple[OpenAI, ThreadPoolExecutor]]:
    """A client of the server, and the threads it is asked from. A fault of the server is an `error`
    with the code `WHAT_failed`."""
    try:
        with asking(
            outside.url,
            outside.model,
            api_key=outside.api_key,
            retries=retries,
            timeout=timeout,
            parallel=parallel,
            follow_redirects=False,
        ) as found:
            yield found
    except SteerError as failed:
        if failed.code != "judge_failed":
            raise
        raise error(_told(outside, what, failed.__cause__), code=f"{what}_failed") from (
            None if outside.hidden else failed
        )


def _told(outside: OutsideModel, what: str, cause: BaseException | None) -> str:
    if not outside.hidden:
        return (
            f"the {what} at {outside.url!r} cannot be asked: {cause}; check the URL, the model "
            f"{outside.model!r} and the key"
        )
    kind = type(cause).__name__
    status = getattr(cause, "status_code", None)
    log.warning("the %s cannot be asked: %s, status %s", what, kind, status)
    return (
        f"this server's {what} cannot be asked ({kind}): try again later, or tell the operator, "
        "whose log says more"
    )
