"""What a request for a fit is: the parameters of one method, and how it is run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, field_validator
from pydantic_core import CoreSchema

from steer.errors import SteerError, Unsupported, pointer
from steer.fit.requests.fields import (
    DescriptionField,
    LayersField,
    LicenceField,
    NameField,
    PositionsField,
    SiteField,
    WhereField,
    data_text,
)
from steer.fit.requests.inline import DataForm
from steer.spec import Site, Where, exactly_one

if TYPE_CHECKING:
    from pathlib import Path

    from steer.artefacts.affine import AffineMap
    from steer.artefacts.concepts.probe import ConceptProbe
    from steer.artefacts.control_vector import ControlVector, LowRankAdapter
    from steer.artefacts.detector import Detector
    from steer.artefacts.lens import Lens
    from steer.artefacts.oracle import Oracle
    from steer.engines.base import Engine
    from steer.model import HookPoint
    from steer.registry.registry import Registry

Artefact: TypeAlias = (
    "ControlVector | LowRankAdapter | AffineMap | Lens | Detector | Oracle | ConceptProbe"
)


@dataclass(frozen=True)
class FitPlace:
    """What a fit works with.

    `registry` is where names are looked up, `files` are vectors beside it, `source` is the model
    that a vector comes from. `progress` is told of every item done; `batch` is how many prompts or
    pairs are read at once (None: as the method has it), which changes memory and not the result.
    """

    engine: Engine
    registry: Registry | None = None
    files: Mapping[str, ControlVector] = field(default_factory=dict)
    source: Engine | None = None
    progress: Callable[[int], None] | None = None
    batch: int | None = None

    def lookup(self) -> Registry:
        """The registry, for a request that `needs_registry`."""
        assert self.registry is not None, "this request needs a registry"
        return self.registry

    def vector(self, ref: str) -> ControlVector:
        """The vector `ref`; raises `UnknownArtefact`."""
        return self.files[ref] if ref in self.files else self.lookup().vector(ref)


@dataclass(frozen=True)
class Fitted:
    """What came out: artefacts under their names, with a table of `headings` and `rows` or
    sentences for a person to read, and a function that draws it into a file."""

    artefacts: Mapping[str, Artefact]
    notes: tuple[str, ...] = ()
    title: str = ""
    headings: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    draw: Callable[[Path], None] | None = None


class FitRequest(BaseModel):
    """The parameters of one method.

    A method is a subclass: `command` is its name on the command line and the end of its route,
    `summary` says in a line what it does, `form` how its data comes (None: in its fields), `many`
    whether it makes several artefacts, `drawn` whether what comes out can be drawn, `doing` what is
    counted while it runs, `batch_size` how many prompts are read at once, `resumes` whether it
    keeps how far it has got, so that the command goes on where it was ended, as jobs do.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        schema = handler(core_schema)
        if cls.form is not None:
            handler.resolve_ref_schema(schema).update(exactly_one(cls.form.field, "data"))
        return schema

    @field_validator("data", mode="before", check_fields=False)
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        return value if cls.form is None else data_text(value, cls.form.field)

    command: ClassVar[str]
    summary: ClassVar[str]
    form: ClassVar[DataForm[Any] | None] = None
    many: ClassVar[bool] = False
    drawn: ClassVar[bool] = False
    doing: ClassVar[str] = "reading prompts"
    batch_size: ClassVar[int | None] = 16
    needs_gradients: ClassVar[bool] = False
    resumes: ClassVar[bool] = False

    @property
    def needs_registry(self) -> bool:
        """Whether it names artefacts."""
        return False

    @property
    def source_model(self) -> str | None:
        """A second model that it needs, besides the one it fits for."""
        return None

    def points(self) -> Iterator[tuple[str, HookPoint]]:
        """The hook points that it names, each with the pointer of the field."""
        yield from ()

    def check(self, engine: Engine, registry: Registry, data: Any) -> None:
        """Raises what is wrong, beyond the fields' own bounds, before anything is run."""

    def taken(self) -> Any:
        """The data that came with the request; raises `SteerError`."""
        if self.form is None:
            return None
        return self.form.taken(getattr(self, self.form.field), getattr(self, "data", None))

    @property
    def data_at(self) -> str:
        """The pointer of the field that its data came in."""
        assert self.form is not None
        return "/data" if getattr(self, "data", None) is not None else f"/{self.form.field}"

    def at_once(self, place: FitPlace) -> int:
        """How many prompts are read in one batch."""
        return place.batch or self.batch_size or 1

    @abstractmethod
    def work(self, data: Any) -> int:
        """How many items `run` will tell `progress` of."""

    @abstractmethod
    def run(self, place: FitPlace, data: Any) -> Fitted:
        """Fits. Raises `SteerError`."""


def check_request(request: FitRequest, engine: Engine, registry: Registry) -> None:
    """Raises `SteerError` for what `request` asks of this engine in vain, at the field."""
    from steer.engines.gradients import differentiable

    if not engine.capabilities.captures:
        raise Unsupported(
            "this engine cannot read activations, which fitting needs: GET "
            "/v1/steering/capabilities says what it can",
            code="no_captures",
        )
    if request.needs_gradients:
        differentiable(engine)
    check_selections(request, engine)
    request.check(engine, registry, request.taken())
    for at, point in request.points():
        try:
            engine.info.check_point(point)
        except SteerError as error:
            error.param = at
            raise


def check_selections(request: BaseModel, engine: Engine) -> None:
    """Raises `SteerError`, below the field, for a selection of tokens that the engine's model does
    not know."""
    from steer.engines.selecting import TokenChoice

    for name in type(request).model_fields:
        value = getattr(request, name)
        if isinstance(value, Where):
            TokenChoice.of(engine, value, at=pointer(name))


class CardFields(FitRequest):
    """What the card says of a fit besides its measures."""

    description: DescriptionField = ""
    licence: LicenceField = ""


class ReadingFields(CardFields):
    """Which states are read, and where what is made of them acts."""

    name: NameField
    site: SiteField = "resid_post"
    layers: LayersField = None
    positions: PositionsField = "last"
    where: WhereField = "last"

    def points(self) -> Iterator[tuple[str, HookPoint]]:
        yield from site_points(self.site, self.layers)


def site_points(site: Site, layers: Sequence[int] | None) -> Iterator[tuple[str, HookPoint]]:
    """The hook points of fields `site` and `layers`; where no layer is named the site counts."""
    from steer.model import HookPoint

    for place, layer in enumerate(layers or ()):
        yield pointer("layers", place), HookPoint(layer, site)
    if layers is None:
        yield "/site", HookPoint(0, site)
