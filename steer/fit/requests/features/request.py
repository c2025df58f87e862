"""What all requests about the features of an SAE have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from steer.errors import SteerError, Unsupported
from steer.fit.requests.fields import Ref, Spelled

if TYPE_CHECKING:
    from steer.engines.base import Engine
    from steer.registry.registry import Registry

SAEField = Annotated[
    Ref,
    Spelled(argument=True, help="The SAE, by its name."),
    Field(description="The SAE, by its name."),
]


class SAERequest(BaseModel):
    """An SAE whose features are asked about, on the model that is served."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sae: SAEField

    def check(self, engine: Engine, registry: Registry) -> None:
        """Raises what is wrong, before anything is read."""
        from steer.fit.features.surveying import check_fits

        if not engine.capabilities.captures:
            raise Unsupported(
                "this engine cannot read activations, which features are read from: GET "
                "/v1/steering/capabilities says what it can",
                code="no_captures",
            )
        try:
            sae = registry.sae(self.sae)
        except SteerError as error:
            raise error.at("/sae") from None
        check_fits(engine, sae)
