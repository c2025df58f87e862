"""Every way to fit: each is a command `steer fit NAME`, a kind of job and a route."""

from __future__ import annotations

from steer.fit.requests.detector import DetectorRequest
from steer.fit.requests.dictionaries import NmfRequest, SnmfRequest
from steer.fit.requests.labels import LabelsRequest
from steer.fit.requests.lenses.jacobian_lens import JacobianLensRequest
from steer.fit.requests.lenses.token import TokenRequest
from steer.fit.requests.lenses.tuned_lens import TunedLensRequest
from steer.fit.requests.linear.act import ActRequest
from steer.fit.requests.linear.alphasteer import AlphaSteerRequest
from steer.fit.requests.linear.angular import AngularRequest
from steer.fit.requests.linear.conceptor import ConceptorRequest
from steer.fit.requests.linear.psr import PsrRequest
from steer.fit.requests.lrc import LrcRequest
from steer.fit.requests.pairs import PairsRequest
from steer.fit.requests.request import FitRequest
from steer.fit.requests.trained.concepts import ConceptsFitRequest
from steer.fit.requests.trained.low_rank import LowRankRequest
from steer.fit.requests.trained.oracle import OracleRequest
from steer.fit.requests.trained.prosv import ProsvRequest
from steer.fit.requests.trained.reps import RepsRequest
from steer.fit.requests.transfer import TransferRequest
from steer.fit.requests.two_prompts import TwoPromptsRequest

FIT_REQUESTS: tuple[type[FitRequest], ...] = (
    LrcRequest,
    LowRankRequest,
    TransferRequest,
    TunedLensRequest,
    JacobianLensRequest,
    TokenRequest,
    SnmfRequest,
    NmfRequest,
    PairsRequest,
    LabelsRequest,
    DetectorRequest,
    TwoPromptsRequest,
    AlphaSteerRequest,
    RepsRequest,
    ProsvRequest,
    PsrRequest,
    OracleRequest,
    ConceptsFitRequest,
    ActRequest,
    ConceptorRequest,
    AngularRequest,
)
