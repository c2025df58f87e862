"""Inspection: what a model's hidden states say. One method per file, on any engine.

A new method is a file that ends with its `Inspection`, and a line in `METHODS`.
"""

from steer.inspection.activations import (
    ACTIVATIONS,
    ActivationsRequest,
    ActivationsResult,
    activations,
    activations_heat_map,
)
from steer.inspection.attribution.drawing import attribution_heat_map
from steer.inspection.attribution.method import ATTRIBUTION, AttributionRequest, attribution
from steer.inspection.attribution.result import AttributionResult
from steer.inspection.clusters.method import CLUSTERS, ClustersRequest, clusters
from steer.inspection.clusters.result import ClustersResult
from steer.inspection.concepts.method import CONCEPTS, concepts
from steer.inspection.concepts.request import ConceptsRequest
from steer.inspection.concepts.result import ConceptsResult
from steer.inspection.controls import CONTROLS
from steer.inspection.flow.method import FLOW, FlowRequest, flow
from steer.inspection.flow.result import FlowResult
from steer.inspection.logit_lens import (
    LOGIT_LENS,
    LogitLensRequest,
    LogitLensResult,
    lens_heat_map,
    logit_lens,
)
from steer.inspection.matching.coordinates import (
    COORDINATES,
    CoordinatesRequest,
    CoordinatesResult,
    coordinates,
    coordinates_scatter,
)
from steer.inspection.matching.method import MATCH, MatchRequest, match
from steer.inspection.matching.result import MatchResult, match_heat_map
from steer.inspection.method import Inspection
from steer.inspection.oracles.ask import ASK, ask, ask_heat_map
from steer.inspection.oracles.request import AskRequest
from steer.inspection.oracles.result import AskResult
from steer.inspection.patchscopes.method import (
    PATCHSCOPE,
    PatchscopeRequest,
    patchscope,
    patchscope_heat_map,
)
from steer.inspection.patchscopes.result import PatchscopeResult
from steer.inspection.tracing.method import TRACE, TraceRequest, trace
from steer.inspection.tracing.result import TraceResult, trace_heat_map
from steer.inspection.weights.drawing import weights_heat_map
from steer.inspection.weights.method import WEIGHTS, weights
from steer.inspection.weights.request import WeightsRequest
from steer.inspection.weights.result import WeightsResult
from steer.model import Capabilities

__all__ = [
    "ACTIVATIONS",
    "ASK",
    "ATTRIBUTION",
    "CLUSTERS",
    "CONCEPTS",
    "CONTROLS",
    "COORDINATES",
    "FLOW",
    "LOGIT_LENS",
    "MATCH",
    "METHODS",
    "PATCHSCOPE",
    "TRACE",
    "WEIGHTS",
    "ActivationsRequest",
    "ActivationsResult",
    "AskRequest",
    "AskResult",
    "AttributionRequest",
    "AttributionResult",
    "ClustersRequest",
    "ClustersResult",
    "ConceptsRequest",
    "ConceptsResult",
    "CoordinatesRequest",
    "CoordinatesResult",
    "FlowRequest",
    "FlowResult",
    "Inspection",
    "LogitLensRequest",
    "LogitLensResult",
    "MatchRequest",
    "MatchResult",
    "PatchscopeRequest",
    "PatchscopeResult",
    "TraceRequest",
    "TraceResult",
    "WeightsRequest",
    "WeightsResult",
    "activations",
    "activations_heat_map",
    "ask",
    "ask_heat_map",
    "attribution",
    "attribution_heat_map",
    "clusters",
    "concepts",
    "coordinates",
    "coordinates_scatter",
    "flow",
    "lens_heat_map",
    "logit_lens",
    "match",
    "match_heat_map",
    "offered",
    "patchscope",
    "patchscope_heat_map",
    "trace",
    "trace_heat_map",
    "weights",
    "weights_heat_map",
]

METHODS: tuple[Inspection, ...] = (
    PATCHSCOPE,
    LOGIT_LENS,
    ACTIVATIONS,
    ASK,
    ATTRIBUTION,
    TRACE,
    WEIGHTS,
    MATCH,
    COORDINATES,
    CLUSTERS,
    CONCEPTS,
    FLOW,
)


def offered(able: Capabilities) -> tuple[str, ...]:
    """The names of the methods that an engine with these capabilities can carry out."""
    return tuple(method.name for method in METHODS if method.possible(able))
