"""A detector, from texts that have what it is to detect and texts that have not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, StrictFloat, StrictInt

from steer.artefacts.detection import MAX_WINDOW
from steer.errors import SteerError
from steer.fit.requests.fields import (
    MAX_ITEMS,
    CaptureField,
    DataField,
    LayersField,
    NameField,
    SeedField,
    SiteField,
)
from steer.fit.requests.inline import LABELLED, LabelledParam
from steer.fit.requests.request import CardFields, FitPlace, Fitted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from steer.artefacts.calibration import MeasuredInterval
    from steer.engines.base import Engine
    from steer.fit.data.labels import LabelledSet
    from steer.model import HookPoint
    from steer.registry.registry import Registry


class DetectorRequest(CardFields):
    """Texts labelled true and false, as an array or as the text of a JSON lines file."""

    command: ClassVar = "detector"
    summary: ClassVar = "Fit a detector to texts that have something and texts that have not."
    form: ClassVar = LABELLED
    doing: ClassVar = "reading texts"
    drawn: ClassVar = True

    name: NameField
    texts: (
        Annotated[
            tuple[LabelledParam, ...], Field(min_length=2, max_length=MAX_ITEMS, fail_fast=True)
        ]
        | None
    ) = None
    data: DataField = None
    states: CaptureField = None
    detects: Annotated[
        str, Field(max_length=4096, description="What it detects, in a sentence.")
    ] = ""
    site: SiteField = "resid_post"
    layers: LayersField = None
    tokens: Annotated[
        Literal["all", "response"],
        Field(description="The tokens that are watched: all of a text, or those of the response."),
    ] = "all"
    pooling: Annotated[
        Literal["max", "mean"], Field(description="How the scores of the last tokens are pooled.")
    ] = "max"
    last: Annotated[
        StrictInt, Field(ge=1, le=MAX_WINDOW, description="How many last tokens are pooled.")
    ] = 1
    threshold: Annotated[
        Literal["false_positive_rate", "conformal"],
        Field(
            description="How the threshold is chosen: by the rate on harmless texts of the data, "
            "or so that it holds for further ones like them (conformal)."
        ),
    ] = "false_positive_rate"
    rate: Annotated[
        StrictFloat, Field(gt=0, lt=1, description="The most false positives, as a share.")
    ] = 0.05
    held_out: Annotated[
        StrictFloat, Field(gt=0, le=0.9, description="The share of the data kept for measuring.")
    ] = 0.3
    seed: SeedField = 0

    def points(self) -> Iterator[tuple[str, HookPoint]]:
        from steer.fit.requests.request import site_points

        yield from site_points(self.site, self.layers)

    def check(self, engine: Engine, registry: Registry, data: LabelledSet) -> None:
        from steer.fit.methods.detectors.fitting import check_data

        try:
            check_data(data, self.held_out, self.seed, self.threshold, self.rate)
        except SteerError as error:
            error.param = error.param or f"/{'data' if self.data else 'texts'}"
            raise

    def work(self, data: LabelledSet) -> int:
        from steer.fit.methods.detectors.fitting import work_of

        return work_of(data, self.held_out, self.seed)

    def run(self, place: FitPlace, data: LabelledSet) -> Fitted:
        from functools import partial

        from steer.fit.methods.detectors.fitting import fit_detector
        from steer.fit.methods.detectors.plot import plot_roc

        found = fit_detector(
            place.engine,
            data,
            name=self.name,
            detects=self.detects,
            site=self.site,
            layers=self.layers,
            tokens=self.tokens,
            pooling=self.pooling,
            last=self.last,
            threshold=self.threshold,
            rate=self.rate,
            held_out=self.held_out,
            seed=self.seed,
            batch=self.at_once(place),
            description=self.description,
            licence=self.licence,
            progress=place.progress,
        )
        measures = found.detection.measures
        assert measures is not None, "a fit measures"
        rows = {
            "as it is served": measures.auroc,
            "mean states: the probe": measures.probe,
            "mean states: nearest neighbours": measures.neighbours,
            "mean states: shuffled labels": measures.shuffled,
        }
        return Fitted(
            {self.name: found},
            notes=(
                f"layer {found.point.layer}; threshold {found.threshold:.3f} by "
                f"{self.threshold.replace('_', ' ')} ({self.rate:g}, {found.detection.calibration} "
                "safe texts)",
                f"held out: fires on {measures.true_positive_rate:.0%} of {measures.positive} with "
                f"it, on {measures.false_positive_rate:.0%} of {measures.negative} without",
            ),
            title=f"{self.name}: AUROC on {measures.positive} and {measures.negative} other texts",
            headings=("", "AUROC", "interval"),
            rows=tuple((name, f"{one.value:.3f}", _ends(one)) for name, one in rows.items()),
            draw=partial(plot_roc, found),
        )


def _ends(found: MeasuredInterval) -> str:
    return f"{found.low:.3f} – {found.high:.3f}"
