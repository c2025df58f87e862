"""Everything about the server that an operator may choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
)

from steer.artefacts.arming import MAX_ARMED, ArmedDetector, parse_armed
from steer.errors import SpecError, SteerError
from steer.fit.features.asked.embedder import Embedder
from steer.fit.features.asked.outside import OutsideModel
from steer.fit.features.labeller import Labeller
from steer.jobs.limits import CaptureRoom, JobLimits
from steer.plan.resolve import Policy, StrengthLimit

MIB = 1 << 20


def _several(value: Any) -> Any:
    return tuple(filter(None, value.split(","))) if isinstance(value, str) else value


Several = Annotated[tuple[str, ...], BeforeValidator(_several)]
"""Names; in an environment variable with commas between them."""


def _each_armed(value: tuple[str, ...]) -> tuple[str, ...]:
    for text in value:
        parse_armed(text)
    return value


Armed = Annotated[Several, AfterValidator(_each_armed), Field(max_length=MAX_ARMED)]
"""Detectors, each as `name` or `name:stop`."""


class ServerSettings(BaseModel):
    """Settings of one server; the defaults serve the demo model on loopback.

    `registry` is a folder or a URL; `catalogue` the SQLAlchemy URL of its catalogue, which a folder
    has of its own (None).
    `served_name` is the model's name in the API (the engine's own where None). `measured_share` is
    the share of steered requests whose edit sizes are measured for the metrics, besides those that
    ask for it. `metric_names` bounds how many vectors and profiles get a label of their own.
    `strength_limit` says what happens to a strength outside its vector's calibrated range.
    `job_workers` jobs run at a time (0: this server only queues them), `job_queue` more may wait,
    `jobs_kept` finished ones are remembered; while requests run, jobs take the share `job_duty` of
    the engine's time. `inspection_workers` inspections run at a time, `inspection_queue` more may
    wait. Read-outs of a request read at most `readout_layers` layers by one field and give at most
    `readout_numbers` numbers for a token and `readout_values` for a sequence. `detectors` are armed
    on every request. A job may keep the states of up to `capture_rows` tokens, and all that are
    kept may take `capture_bytes` of the disk (0: none are kept). `hub_imports` is whether clients
    may have artefacts fetched from the hub, of up to `max_hub_bytes` each. `embedder` and
    `labeller` are models that this server asks for its clients, each as http://HOST/v1#model=NAME
    with a key of its own; a job may ask the labeller at most `labeller_questions`.
    Without a key, `insecure` is needed to listen on more than loopback, the server answers to its
    addresses and to `allowed_hosts`, and takes requests from its own pages and from those of
    `allowed_origins`, which browsers are told as well. A connection that has sent no whole request
    for `patience_seconds` is closed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    model: str = "steer-demo"
    served_name: str | None = None
    engine: str = "transformers"
    engine_options: dict[str, Any] = Field(default_factory=dict)
    registry: str = "steer-registry"
    catalogue: SecretStr | None = None
    api_key: SecretStr | None = None
    max_body_bytes: int = Field(default=8 * MIB, ge=1)
    max_upload_bytes: int = Field(default=512 * MIB, ge=1)
    max_choices: int = Field(default=32, ge=1)
    allow_inline_vectors: bool = True
    measured_share: float = Field(default=0.01, ge=0, le=1)
    metric_names: int = Field(default=200, ge=1)
    plan_cache_size: int = Field(default=1024, ge=1)
    strength_limit: StrengthLimit = "off"
    drain_seconds: int = Field(default=10, ge=0)
    job_workers: int = Field(default=1, ge=0, le=64)
    job_queue: int = Field(default=16, ge=1)
    jobs_kept: int = Field(default=200, ge=1)
    job_duty: float = Field(default=0.03, gt=0, le=1)
    inspection_workers: int = Field(default=2, ge=1, le=64)
    inspection_queue: int = Field(default=32, ge=0)
    readout_layers: int = Field(default=64, ge=1)
    readout_numbers: int = Field(default=1024, ge=1)
    readout_values: int = Field(default=1 << 22, ge=1)
    detectors: Armed = ()
    capture_rows: int = Field(default=1 << 24, ge=1)
    capture_bytes: int = Field(default=4 << 30, ge=0)
    hub_imports: bool = True
    max_hub_bytes: int = Field(default=512 * MIB, ge=1)
    embedder: str | None = None
    embedder_key: SecretStr | None = None
    labeller: str | None = None
    labeller_key: SecretStr | None = None
    labeller_questions: int = Field(default=4096, ge=1)
    insecure: bool = False
    allowed_hosts: Several = ()
    allowed_origins: Several = ()
    access_log: bool = True
    patience_seconds: float = Field(default=60.0, gt=0)

    @field_validator("embedder", "labeller")
    @classmethod
    def _place(cls, place: str | None) -> str | None:
        if place is not None:
            try:
                OutsideModel.at(place)
            except SteerError as error:
                raise ValueError(error.message) from None
        return place

    @property
    def asked_embedder(self) -> Embedder | None:
        """The model that embeds labels and what is searched for, if there is one."""
        found = _outside(self.embedder, self.embedder_key)
        return None if found is None else Embedder(found)

    @property
    def asked_labeller(self) -> Labeller | None:
        """The model that makes and judges labels, if there is one."""
        found = _outside(self.labeller, self.labeller_key)
        return None if found is None else Labeller(found, most=self.labeller_questions)

    @property
    def job_limits(self) -> JobLimits:
        """What jobs may take of this server."""
        return JobLimits(
            workers=self.job_workers,
            queue=self.job_queue,
            keep=self.jobs_kept,
            duty=self.job_duty,
        )

    @property
    def captures(self) -> CaptureRoom:
        """What states that jobs keep may take."""
        return CaptureRoom(self.capture_rows, self.capture_bytes)

    @property
    def armed(self) -> tuple[ArmedDetector, ...]:
        """The detectors on every request."""
        return tuple(map(parse_armed, self.detectors))

    @property
    def spec_policy(self) -> Policy:
        """What clients' specs may do here."""
        return Policy(self.allow_inline_vectors, self.strength_limit)

    @property
    def catalogue_url(self) -> str | None:
        """The catalogue's URL in the clear."""
        return None if self.catalogue is None else self.catalogue.get_secret_value()

    def measures(self, name: str) -> bool:
        """Whether a request belongs to the share that is measured; `name` ends in random hex."""
        return int(name[-8:], 16) < self.measured_share * 0x1_0000_0000


def _outside(place: str | None, key: SecretStr | None) -> OutsideModel | None:
    if place is None:
        return None
    return OutsideModel.at(place, None if key is None else key.get_secret_value(), hidden=True)


_FROM_ENVIRONMENT = (
    "max_body_bytes",
    "max_upload_bytes",
    "allow_inline_vectors",
    "measured_share",
    "metric_names",
    "plan_cache_size",
    "strength_limit",
    "job_workers",
    "job_queue",
    "jobs_kept",
    "job_duty",
    "inspection_workers",
    "inspection_queue",
    "readout_layers",
    "readout_numbers",
    "readout_values",
    "detectors",
    "capture_rows",
    "capture_bytes",
    "hub_imports",
    "max_hub_bytes",
    "embedder",
    "embedder_key",
    "labeller",
    "labeller_key",
    "labeller_questions",
    "insecure",
    "allowed_hosts",
    "allowed_origins",
    "access_log",
    "patience_seconds",
)
VARIABLES = {name: "STEER_" + name.upper() for name in _FROM_ENVIRONMENT}
"""The environment variable of each setting that has one, on every engine's server."""


def settings_from(environment: Mapping[str, str], **given: Any) -> ServerSettings:
    """The settings `given`, and what else the environment's variables say.

    Raises `SpecError` naming a variable that is wrong.
    """
    read = {  # pydantic reads the texts
        name: environment[variable]
        for name, variable in VARIABLES.items()
        if variable in environment and name not in given
    }
    try:
        return ServerSettings(**read, **given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        source = VARIABLES[name] if name in read else name
        raise SpecError(
            f"{source}={first['input']!r}: {first['msg']}; set it to another value, or not at all",
            code="invalid_option",
        ) from None
