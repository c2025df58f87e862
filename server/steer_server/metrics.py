"""What the server counts, for Prometheus. docs/metrics.md describes every name.

Labels are bounded: outcomes and codes come from fixed sets, and names of vectors and profiles get
labels of their own only up to a limit, then share the label `other`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from anyio import get_cancelled_exc_class
from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.requests import ClientDisconnect

from steer.engines.base import Engine, Receipt
from steer.plan.cache import PlanCache
from steer.registry.jobs.job_records import Job
from steer.registry.registry import Registry
from steer_server.inspection_queue import InspectionQueue
from steer_server.live_figures import LiveFigures

OTHER = "other"
NONE = "none"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_JOB_SECONDS = (1, 5, 15, 60, 300, 900, 3600, 14400)
_STRENGTHS = (-8, -4, -2, -1, -0.5, -0.25, 0, 0.25, 0.5, 1, 2, 4, 8, 16)
_SCORES = (-32, -16, -8, -4, -2, -1, 0, 1, 2, 4, 8, 16, 32)
_SIZES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1, 2)


def _bare(reference: str) -> str:
    """The name in `name@hash`."""
    return reference.partition("@")[0]


class Names:
    """Label values: each name its own until there are `limit` of them, then `other`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[str] = set()
        self._lock = threading.Lock()

    def label(self, name: str) -> str:
        with self._lock:
            if len(self._known) < self._limit:
                self._known.add(name)
            return name if name in self._known else OTHER


class Metrics:
    """The figures of one server, in a registry of their own."""

    def __init__(self, *, name_limit: int) -> None:
        own = self.registry = CollectorRegistry()
        self._vectors, self._profiles = Names(name_limit), Names(name_limit)
        self._detectors = Names(name_limit)
        self.requests = Counter(
            "steer_requests",
            "Requests by profile and outcome",
            ("profile", "outcome"),
            registry=own,
        )
        self.vector_requests = Counter(
            "steer_vector_requests",
            "Requests that used a vector, by outcome",
            ("vector", "outcome"),
            registry=own,
        )
        self.rejects = Counter(
            "steer_rejects", "Requests answered with an error", ("code",), registry=own
        )
        self.tokens = Counter(
            "steer_tokens",
            "Tokens of steered requests: steered, skipped, or steered and read from a cache",
            ("treatment",),
            registry=own,
        )
        self.strength = Histogram(
            "steer_strength_ratio",
            "Strengths asked for, in multiples of the vector",
            buckets=_STRENGTHS,
            registry=own,
        )
        self.edit_size = Histogram(
            "steer_edit_size_ratio",
            "Mean size of the edit over the size of the state, per request and hook point",
            buckets=_SIZES,
            registry=own,
        )
        self.gate_fires = Counter(
            "steer_gate_fires", "Tokens that a gate let through", registry=own
        )
        self.readout_values = Counter(
            "steer_readout_values",
            "Numbers read off the states of requests while they run, by the field that asks",
            ("reading",),
            registry=own,
        )
        self._detector_fires = Counter(
            "steer_detector_fires",
            "Sequences in which a detector fired, by what it was armed to do",
            ("detector", "action"),
            registry=own,
        )
        self._detector_scores = Histogram(
            "steer_detector_score_logits",
            "The greatest pooled score of a detector in a sequence",
            ("detector",),
            buckets=_SCORES,
            registry=own,
        )
        self.first_token = Histogram(
            "steer_time_to_first_token_seconds",
            "From the request to its first token",
            ("steered",),
            buckets=_SECONDS,
            registry=own,
        )
        self.output_token = Histogram(
            "steer_time_per_output_token_seconds",
            "Mean time between the tokens of a sequence",
            ("steered",),
            buckets=_STEP_SECONDS,
            registry=own,
        )
        self.plan_compile = Histogram(
            "steer_plan_compile_seconds", "Compiling one plan", buckets=_SECONDS, registry=own
        )
        self.jobs_ended = Counter(
            "steer_jobs_ended",
            "Jobs that this server ended, by kind and final state",
            ("kind", "state"),
            registry=own,
        )
        self.job_duration = Histogram(
            "steer_job_duration_seconds",
            "How long a job ran here",
            ("kind",),
            buckets=_JOB_SECONDS,
            registry=own,
        )

    def watch(
        self,
        engine: Engine,
        plans: PlanCache,
        artefacts: Registry,
        inspections: InspectionQueue,
    ) -> None:
        """Adds the live figures of the parts, read whenever metrics are asked for."""
        self.registry.register(LiveFigures(engine, plans, artefacts, inspections))

    @contextmanager
    def request(
        self, profile: str | None, vectors: Sequence[str], strengths: Sequence[float]
    ) -> Iterator[None]:
        """Counts one admitted request with its outcome: ok, cancelled or error."""
        for strength in strengths:
            self.strength.observe(strength)
        outcome = "error"
        try:
            yield
            outcome = "ok"
        except (GeneratorExit, ClientDisconnect, get_cancelled_exc_class()):
            outcome = "cancelled"
            raise
        finally:
            label = NONE if profile is None else self._profiles.label(profile)
            self.requests.labels(label, outcome).inc()
            for vector in vectors:
                self.vector_requests.labels(self._vectors.label(vector), outcome).inc()

    def detector_fired(self, name: str, action: str) -> None:
        """Counts a sequence in which the detector called `name` fired."""
        self._detector_fires.labels(self._detectors.label(_bare(name)), action).inc()

    def detector_score(self, name: str, score: float) -> None:
        """Takes down the greatest score of the detector called `name` in a sequence."""
        self._detector_scores.labels(self._detectors.label(_bare(name))).observe(score)

    def job(self, job: Job, seconds: float) -> None:
        """Counts a job that ended here; one that was cancelled in the queue did not run."""
        self.jobs_ended.labels(job.kind, job.state).inc()
        if job.started_at is not None:
            self.job_duration.labels(job.kind).observe(seconds)

    def receipt(self, receipt: Receipt) -> None:
        """Counts what one finished sequence's receipt says."""
        self.tokens.labels("steered").inc(receipt.tokens_steered)
        self.tokens.labels("skipped").inc(receipt.tokens_skipped)
        self.tokens.labels("cached").inc(receipt.tokens_cached)
        self.gate_fires.inc(sum(gate.fired for gate in receipt.gates))
        for point in receipt.hook_points:
            if point.relative_size is not None:
                self.edit_size.observe(point.relative_size)
