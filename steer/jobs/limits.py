"""What jobs may take of a server."""

from __future__ import annotations

from dataclasses import dataclass

from steer.errors import SteerError


@dataclass(frozen=True)
class CaptureRoom:
    """What states that jobs keep may take of a server: `rows` those of one job, `bytes` all that
    are kept; where that is 0, none are."""

    rows: int = 1 << 24
    bytes: int = 4 << 30


@dataclass(frozen=True)
class JobLimits:
    """Bounds on the jobs of one server.

    `workers` jobs run at a time (0: this server only queues them), `queue` more may wait, and
    `keep` finished ones are remembered. A runner holds a job for `lease_seconds` and renews that
    while it lives; a job of a repeatable kind is begun at most `attempts` times. Progress is
    written down every `progress_seconds` at most; an idle worker looks for work of other servers
    every `poll_seconds`.

    While requests run, jobs take the share `duty` of the engine's time, in pieces of at most
    `busy_tokens` prompt tokens or `busy_sequences` generated sequences; otherwise in pieces of
    `idle_tokens` and `idle_sequences`, and the engine counts as idle `quiet_seconds` after the
    last request was seen. `threads` is how many threads their own arithmetic may use.
    """

    workers: int = 1
    queue: int = 16
    keep: int = 200
    lease_seconds: float = 30.0
    attempts: int = 3
    progress_seconds: float = 1.0
    poll_seconds: float = 5.0
    duty: float = 0.03
    busy_tokens: int = 64
    busy_sequences: int = 1
    idle_tokens: int = 1024
    idle_sequences: int = 32
    quiet_seconds: float = 1.0
    threads: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.duty <= 1:
            raise SteerError(
                f"duty is a share above 0 and up to 1; got {self.duty!r}", code="invalid_option"
            )
        at_least_one = ("queue", "keep", "attempts", "busy_tokens", "busy_sequences")
        for name in (*at_least_one, "idle_tokens", "idle_sequences", "threads"):
            if getattr(self, name) < 1:
                raise SteerError(
                    f"{name} must be at least 1; got {getattr(self, name)!r}", code="invalid_option"
                )
