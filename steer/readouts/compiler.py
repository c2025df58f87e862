"""From a read-out spec to its plan: every name looked up and checked once, errors by field."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steer.artefacts.lens import Lens
from steer.artefacts.library import Library
from steer.artefacts.sae.architectures import architecture_named
from steer.artefacts.sae.base import SAE
from steer.errors import (
    IncompatibleArtefact,
    SpecError,
    SteerError,
    TooLarge,
    Unsupported,
    pointer,
)
from steer.model import Capabilities, HookPoint, ModelInfo
from steer.plan.plan import SteeringPlan
from steer.plan.points import all_layers, row
from steer.readouts import measures
from steer.readouts.encoding import part_of
from steer.readouts.plan import ReadoutPlan, check_countable
from steer.readouts.readers import (
    FeatureReader,
    LensReader,
    NormReader,
    ProjectionReader,
    Reader,
    SizeReader,
    TopFeaturesReader,
)
from steer.readouts.spec import FeatureSpec, ReadoutSpec, check_readable

DEFAULT_TOP = 5


@dataclass(frozen=True)
class ReadoutLimits:
    """What one request may read of a token: `numbers` bounds a row, `layers` those of one field."""

    layers: int = 64
    numbers: int = 1024


def compile_readouts(
    spec: ReadoutSpec,
    library: Library,
    model: ModelInfo,
    capabilities: Capabilities,
    plan: SteeringPlan | None,
    limits: ReadoutLimits = ReadoutLimits(),
) -> ReadoutPlan:
    """The plan of `spec` for a request that `plan` steers.

    Raises `SteerError` with a pointer relative to the spec: for names that are not registered or do
    not fit, for what the engine cannot read (`unsupported`), and beyond `limits` (`TooLarge`).
    """
    spec.check_asked()
    check_readable(spec.asked, capabilities)
    sources = _Sources(library, model, capabilities, limits)
    readers = (
        *sources.projections(spec),
        *sources.features(spec),
        *sources.lens(spec),
        *sources.norms(spec),
        *_sizes(spec, plan),
    )
    if spec.kl and (plan is None or not plan.points):
        raise _nothing_steered("kl")
    found = ReadoutPlan(readers, spec.asked, spec.tokens)
    if found.width > limits.numbers:
        raise TooLarge(
            f"{found.width} numbers for each token are more than the {limits.numbers} that a "
            "request may read: ask for fewer layers, vectors or features, or a lower 'top'",
            code="too_many_readouts",
            param=pointer(max(spec.asked, key=lambda name: _numbers(name, readers))),
        )
    return found


@dataclass(frozen=True)
class _Sources:
    library: Library
    model: ModelInfo
    capabilities: Capabilities
    limits: ReadoutLimits

    def projections(self, spec: ReadoutSpec) -> list[Reader]:
        """One reader for each hook point, with all vectors that are read there."""
        found: dict[HookPoint, list[tuple[str, torch.Tensor]]] = {}
        for index, item in enumerate(spec.projections):
            at = pointer("projections", index)
            try:
                vector = self.library.vector(item.vector)
            except SteerError as error:
                raise error.at(f"{at}/vector") from None
            if item.layers == "all":
                layers = all_layers(vector, self.model)
            else:
                layers = item.layers or vector.card.used_layers
            self._check_layers(layers, f"{at}/layers" if item.layers else f"{at}/vector")
            if vector.card.width != self.model.width(vector.card.site):
                raise self._wrong_width("vector", item.vector, vector.card.width, f"{at}/vector")
            for layer in layers:
                point = HookPoint(layer, vector.card.site)
                self._check_point(point, f"{at}/layers" if item.layers else f"{at}/vector")
                try:
                    direction = row(vector, layer)
                except SteerError as error:
                    raise error.at(f"{at}/layers") from None
                found.setdefault(point, []).append((item.vector, measures.unit(direction)))
        return [
            ProjectionReader(
                point, torch.stack([unit for _, unit in mine]), tuple(name for name, _ in mine)
            )
            for point, mine in found.items()
        ]

    def features(self, spec: ReadoutSpec) -> list[Reader]:
        found: list[Reader] = []
        for index, item in enumerate(spec.features):
            at = pointer("features", index)
            try:
                sae = self.library.sae(item.sae)
            except SteerError as error:
                raise error.at(f"{at}/sae") from None
            point = HookPoint(sae.layer, sae.site)
            self._check_point(point, f"{at}/sae")
            if sae.d_in != self.model.width(point.site):
                raise self._wrong_width("SAE", item.sae, sae.d_in, f"{at}/sae")
            found.append(_feature_reader(item, sae, point, at))
        return found

    def lens(self, spec: ReadoutSpec) -> list[Reader]:
        item = spec.lens
        if item is None:
            return []
        if self.capabilities.no_unembedding is not None:
            raise Unsupported(
                self.capabilities.no_unembedding, param="/lens", code="no_unembedding"
            )
        check_countable("the vocabulary", self.model.vocab_size)
        lens: Lens | None = None
        if item.lens is not None:
            try:
                lens = self.library.lens(item.lens)
                lens.check_fits(self.model)
            except SteerError as error:
                raise error.at("/lens/lens") from None
        layers: tuple[int, ...] = self._every if item.layers == "all" else item.layers
        if item.layers == "all" and lens is not None:
            layers = tuple(n for n in layers if lens.reads(n, "resid_post"))
        self._check_layers(layers, "/lens/layers")
        points = [HookPoint(layer) for layer in layers]
        for point in points:
            self._check_point(point, "/lens/layers")
            if lens is not None:
                try:
                    lens.check_reads(point.layer, point.site)
                except SteerError as error:
                    raise error.at("/lens/layers") from None
        top = min(item.top, self.model.vocab_size)
        return [LensReader(point, top, lens, item.lens) for point in points]

    def norms(self, spec: ReadoutSpec) -> list[Reader]:
        layers = self._every if spec.norms == "all" else spec.norms or ()
        self._check_layers(layers, "/norms")
        for layer in layers:
            self._check_point(HookPoint(layer), "/norms")
        return [NormReader(HookPoint(layer)) for layer in layers]

    @property
    def _every(self) -> tuple[int, ...]:
        return tuple(range(self.model.n_layers))

    def _check_layers(self, layers: tuple[int, ...], at: str) -> None:
        if len(layers) > self.limits.layers:
            raise TooLarge(
                f"{len(layers)} layers are more than the {self.limits.layers} that may be read: "
                "name fewer",
                code="too_many_readouts",
                param=at,
            )

    def _check_point(self, point: HookPoint, at: str) -> None:
        self.model.check_point(point, param=at)
        if point.site not in self.capabilities.captures:
            raise Unsupported(
                f"the {self.capabilities.engine} engine reads no states at {point.site!r}",
                code="unsupported_site",
                param=at,
            )

    def _wrong_width(self, kind: str, name: str, width: int, at: str) -> IncompatibleArtefact:
        return IncompatibleArtefact(
            f"the {kind} {name!r} has width {width}, which is not that of {self.model.name!r} at "
            f"its site: use one made for this model",
            code="wrong_width",
            param=at,
        )


def _feature_reader(item: FeatureSpec, sae: SAE, point: HookPoint, at: str) -> Reader:
    check_countable(f"the SAE {item.sae!r}", sae.d_sae)
    if item.features is None:
        if architecture_named(sae.architecture).signed:
            raise Unsupported(
                f"the SAE {item.sae!r} has negative activations, which 'top' does not rank: name "
                "'features'",
                code="unsupported",
                param=f"{at}/top" if item.top is not None else f"{at}/sae",
            )
        return TopFeaturesReader(point, sae, min(item.top or DEFAULT_TOP, sae.d_sae), item.sae)
    for place, feature in enumerate(item.features):
        if feature >= sae.d_sae:
            raise IncompatibleArtefact(
                f"feature {feature} is out of range: the SAE {item.sae!r} has features 0 to "
                f"{sae.d_sae - 1}",
                code="feature_out_of_range",
                param=f"{at}/features/{place}",
            )
    whole = sae.competitive
    read = sae if whole else part_of(sae, item.features)
    labels = {one: sae.labels[one] for one in item.features if one in sae.labels}
    return FeatureReader(point, read, item.features, item.sae, whole, labels)


def _sizes(spec: ReadoutSpec, plan: SteeringPlan | None) -> list[Reader]:
    if not spec.relative_size:
        return []
    if plan is None or not plan.points:
        raise _nothing_steered("relative_size")
    return [SizeReader(point) for point in plan.points]


def _nothing_steered(field: str) -> SpecError:
    return SpecError(
        f"{field!r} says how much the steering did, and nothing is steered here: add 'steering', "
        "use a profile as model, or leave it out",
        code="nothing_to_compare",
        param=pointer(field),
    )


def _numbers(field: str, readers: tuple[Reader, ...]) -> int:
    return sum(one.width for one in readers if one.field == field)
