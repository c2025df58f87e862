"""Inspection: what a model's hidden states say. One method per file, on any engine."""

from steer.inspection.activations import ActivationsRequest, ActivationsResult, activations
from steer.inspection.logit_lens import LogitLensRequest, LogitLensResult, logit_lens
from steer.inspection.patchscope import PatchscopeRequest, PatchscopeResult, patchscope

__all__ = [
    "ActivationsRequest",
    "ActivationsResult",
    "LogitLensRequest",
    "LogitLensResult",
    "PatchscopeRequest",
    "PatchscopeResult",
    "activations",
    "logit_lens",
    "patchscope",
]
