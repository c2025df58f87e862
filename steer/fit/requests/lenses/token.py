"""A token's direction through a lens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, StrictInt, model_validator

from steer.errors import SteerError
from steer.fit.requests.fields import ALL_BY_DEFAULT, LayerList, Ref, SiteField, Spelled
from steer.fit.requests.request import CardFields, FitPlace, Fitted, site_points
from steer.spec import MAX_INTEGER, StoredName

if TYPE_CHECKING:
    from steer.engines.base import Engine
    from steer.model import HookPoint
    from steer.registry.registry import Registry


class TokenRequest(CardFields):
    """The token, and the lens that reads it."""

    command: ClassVar = "token"
    summary: ClassVar = "Keep the direction along which a lens reads a token as a vector."
    doing: ClassVar = "tokens"
    batch_size: ClassVar = None

    name: Annotated[
        StoredName,
        Spelled(argument=True, help="The vector's name."),
        Field(description="The name to register the vector under."),
    ]
    token: Annotated[
        Annotated[str, Field(min_length=1, max_length=1024)] | None,
        Field(description="A text that is one token of the model; a leading space counts."),
    ] = None
    token_id: Annotated[
        Annotated[StrictInt, Field(ge=0, le=MAX_INTEGER)] | None,
        Field(description="The token's id, where it is not said by its text."),
    ] = None
    lens: Annotated[
        Ref | None,
        Field(description="A registered lens, tuned or Jacobian; by default the logit lens."),
    ] = None
    site: SiteField = "resid_post"
    layers: Annotated[
        LayerList | None,
        ALL_BY_DEFAULT,
        Spelled("layers", "Such as 2-5 or 1,3; by default all that the lens has."),
        Field(description="The layers to keep; by default all that the lens has a map for."),
    ] = None

    @model_validator(mode="after")
    def _one_token(self) -> Self:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("give 'token', a text that is one token, or 'token_id'")
        return self

    @property
    def needs_registry(self) -> bool:
        return self.lens is not None

    def points(self) -> Iterator[tuple[str, HookPoint]]:
        yield from site_points(self.site, self.layers)

    def check(self, engine: Engine, registry: Registry, data: Any) -> None:
        from steer.engines.token_rows import token_number

        del data
        asked = self.token if self.token_id is None else self.token_id
        assert asked is not None
        try:
            token_number(asked, engine.tokenizer, engine.info.vocab_size)
        except SteerError as error:
            error.param = "/token" if self.token_id is None else "/token_id"
            raise
        if self.lens is not None:
            try:
                registry.lens(self.lens).check_fits(engine.info)
            except SteerError as error:
                raise error.at("/lens") from None

    def work(self, data: Any) -> int:
        return 1

    def run(self, place: FitPlace, data: Any) -> Fitted:
        from steer.fit.methods.lenses.token import fit_token

        vector = fit_token(
            place.engine,
            name=self.name,
            token=self.token,
            token_id=self.token_id,
            lens=None if self.lens is None else place.lookup().lens(self.lens),
            site=self.site,
            layers=self.layers,
            description=self.description,
            licence=self.licence,
            progress=place.progress,
        )
        return Fitted({self.name: vector})
