"""Random artefacts and specs, by seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch

from steer.artefacts.adapter_parts import EditRows
from steer.artefacts.affine import AffineMap, Channels
from steer.artefacts.artefact import Artefact
from steer.artefacts.calibration import Calibration, MeasuredDose
from steer.artefacts.concepts.form import ProbeForm
from steer.artefacts.concepts.network import CodeNetwork
from steer.artefacts.concepts.probe import ConceptProbe
from steer.artefacts.control_vector import ControlVector, LayerMeasure, LowRankAdapter
from steer.artefacts.detection import Detection
from steer.artefacts.detector import Detector
from steer.artefacts.kinds import ArtefactKind
from steer.artefacts.lens import Lens
from steer.artefacts.lora import Lora, LoraPart
from steer.artefacts.oracle import Oracle
from steer.artefacts.oracle_form import FORMS, OracleForm
from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.pursuit import Pursuit
from steer.model import Capabilities, ModelInfo
from steer.prompts.roles import RoleRanges
from steer.readouts.spec import READOUTS
from steer.spec import KINDS, ROLES, SITES, GateScope, Role

ARCHITECTURES = ("standard", "jumprelu", "topk")
NORMALISATIONS = {"": "none", "-rescaled": "constant_norm_rescale", "-centred": "layer_norm"}
SAE_NAMES = tuple(
    architecture + suffix for suffix in NORMALISATIONS for architecture in ARCHITECTURES
)
COMPETING = ("groupmax", "abstopk", "matching_pursuit")
COMPETING_NAMES = tuple(
    architecture + suffix for suffix in NORMALISATIONS for architecture in COMPETING
)
"""The others, whose features compete in ways of their own."""

_EACH = [0.7, 0.0, 3.0, 1.0, 0.3]
_ADDED = [0.7, 0.1, -1.5, 1.0, -0.3]
MODES: dict[str, dict[str, Any]] = {
    "set": {"value": _EACH},
    "at_least": {"value": _EACH, "mode": "at_least"},
    "at_most": {"value": _EACH, "mode": "at_most"},
    "scale": {"value": _EACH, "mode": "scale"},
    "drop": {"mode": "drop"},
    "keep_only": {"mode": "keep_only"},
    "add": {"value": _ADDED, "mode": "add"},
    "add a share": {"value": {"norm": _ADDED}, "mode": "add"},
    "add in balance": {"value": _ADDED, "mode": "add", "balance": 1.5},
    "add a share in balance": {"value": {"norm": _ADDED}, "mode": "add", "balance": 0.4},
    "set where active": {"value": _EACH, "only_if_active": True},
    "set at least where active": {"value": _EACH, "mode": "at_least", "only_if_active": True},
    "set at most where active": {"value": -0.4, "mode": "at_most", "only_if_active": True},
    "add where active": {"value": _ADDED, "mode": "add", "only_if_active": True},
    "add a share in balance where active": {
        "value": {"norm": _ADDED}, "mode": "add", "balance": 0.4, "only_if_active": True,
    },
    "set a share": {"value": {"norm": _EACH}},
    "set at least a share": {"value": {"norm": 0.2}, "mode": "at_least"},
    "set at most a share where active": {
        "value": {"norm": 0.1}, "mode": "at_most", "only_if_active": True,
    },
}  # fmt: skip


def allowed(sae: str, mode: str) -> bool:
    """Whether there is such a clamp: a target that is a share of the norm is none of the
    deviation."""
    return not (sae.endswith("-centred") and mode.startswith("set") and "a share" in mode)


def clamps_of(saes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What a clamp can be asked for, over some of the SAEs of `artefacts`."""
    return {
        f"clamp {mode} {sae}": {
            "kind": "clamp", "sae": sae, "features": [3, 60, 17, 8, 21], **MODES[mode],
        }
        for sae in saes
        for mode in MODES
        if allowed(sae, mode)
    }  # fmt: skip


CLAMPS = clamps_of(SAE_NAMES)
COMPETING_CLAMPS = clamps_of(COMPETING_NAMES)


def shape_of(width: int = 16, layers: int = 4) -> ModelInfo:
    """A model that has every site; `mlp_act` and `head_out` have widths of their own."""
    return ModelInfo(
        name="tiny",
        architecture="TinyForCausalLM",
        n_layers=layers,
        d_model=width,
        vocab_size=64,
        max_length=128,
        sites=SITES,
        d_mlp=2 * width,
        n_heads=2,
        head_dim=width,
    )


EVERYTHING = Capabilities("test", KINDS, SITES, captures=SITES, readouts=READOUTS, roles=ROLES)


def random_vector(seed: int, *layers: int, width: int = 16, **card: Any) -> ControlVector:
    generator = torch.Generator().manual_seed(seed)
    rows = {layer: torch.randn(width, generator=generator) for layer in layers}
    measures = {layer: LayerMeasure(positive=1.5, negative=-0.5) for layer in layers}
    return ControlVector.of(rows, **{"measures": measures, **card})


def has_direction(row: Sequence[float]) -> bool:
    """Whether a row of numbers may be a vector's: float32 must be able to compute its norm."""
    return 1.1e-19 < math.hypot(*row) < 1.8e19


def calibration(
    kl: tuple[float, ...] = (0.0, 0.1, 0.4),
    effect: tuple[float, ...] | None = (0.0, 0.25, 1.0),
    strengths: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0),
    **fields: Any,
) -> Calibration:
    """A calibration of the tiny model's layer 1 with these tables."""
    doses = tuple(MeasuredDose(strength=s, perplexity_ratio=1.0, kl=0.0) for s in strengths)
    base: dict[str, Any] = {"model": "tiny", "layers": (1,), "site": "resid_post"}
    return Calibration(**{**base, **fields}, doses=doses, kl=kl, effect=effect)


def random_sae(
    architecture: str, *, seed: int = 0, width: int = 16, layer: int = 1, **card: Any
) -> SAE:
    """64 features; a middling share of them is on for random tokens. `architecture` may end in how
    tokens are normalised (`SAE_NAMES`)."""
    architecture, dash, suffix = architecture.partition("-")
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    size = 64
    fields = {
        "W_enc": draw(width, size) / width**0.5,
        "b_enc": 0.3 * draw(size),
        "W_dec": draw(size, width) / width**0.5,
        "b_dec": draw(width),
        "threshold": 0.5 * draw(size).abs() if architecture == "jumprelu" else None,
        "k": 8 if architecture in ("topk", "groupmax", "abstopk") else None,
    }
    if architecture == "matching_pursuit":  # whose rows have length 1, or it would not come nearer
        fields["W_dec"] = torch.nn.functional.normalize(fields["W_dec"], dim=-1)
        fields["pursuit"] = Pursuit(max_iterations=9)
    return SAE.of(
        architecture,
        layer=layer,
        normalize=NORMALISATIONS[dash + suffix],
        **fields | card,
    )


def random_transcoder(architecture: str, *, seed: int = 0, width: int = 16, **card: Any) -> SAE:
    """As `random_sae`, from the input of the MLP of layer 1 to its output, with a skip."""
    skip = torch.randn(width, width, generator=torch.Generator().manual_seed(seed)) / width**0.5
    places = {"site": "mlp_in", "write_site": "mlp_out", "subtract_b_dec": False, "W_skip": skip}
    return random_sae(architecture, seed=seed, width=width, **places | card)


def random_adapter(
    seed: int, *layers: int, width: int = 16, rank: int = 3, **card: Any
) -> LowRankAdapter:
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for layer in layers:
        rotation = torch.linalg.qr(torch.randn(width, rank, generator=generator))[0].T
        weight = torch.randn(rank, width, generator=generator) / width**0.5
        parts[layer] = (rotation.contiguous(), weight, torch.randn(rank, generator=generator))
    return LowRankAdapter.of(parts, **card)


def rectified_adapter(
    seed: int, *layers: int, width: int = 16, rank: int = 2, **card: Any
) -> LowRankAdapter:
    """Read and write rows as such, with thresholds; some rows are on for random tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return LowRankAdapter.of(
        {n: EditRows(draw(rank, width), draw(rank, width), draw(rank), draw(rank)) for n in layers},
        **card,
    )


def random_map(seed: int, *layers: int, width: int = 16, **card: Any) -> AffineMap:
    """Every other channel has bounds, between which about half of all values lie."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return torch.randn(width, generator=generator)

    channels = {}
    for layer in layers:
        bound = torch.full((width,), torch.inf)
        bound[::2] = draw()[::2].abs()
        channels[layer] = Channels(1.0 + draw() / 4, draw(), -bound, bound)
    return AffineMap.of(channels, **card)


def random_lens(seed: int, layers: int, width: int = 16) -> Lens:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / width**0.5

    return Lens.of({layer: (draw(width, width), draw(width)) for layer in range(layers)})


def random_detector(seed: int, layer: int, width: int = 16, **fields: Any) -> Detector:
    generator = torch.Generator().manual_seed(seed)
    return Detector.of(torch.randn(width, generator=generator), layer=layer, **fields)


def random_jacobians(seed: int, layers: int, width: int = 16) -> Lens:
    """A Jacobian lens of a model of so many layers."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {n: torch.randn(width, width, generator=generator) for n in range(1, layers)}
    return Lens.of_jacobians(drawn)


def random_lora(seed: int, modules: Mapping[str, tuple[int, int]], rank: int = 4) -> Lora:
    """Large enough to change what a model says; `modules` have their inputs and outputs."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for name, (inputs, outputs) in modules.items():
        down = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        parts[name] = LoraPart(down, torch.randn(outputs, rank, generator=generator) / 4, 2.0)
    return Lora.of(parts)


def random_oracle(
    seed: int,
    modules: Mapping[str, tuple[int, int]],
    layers: int,
    width: int = 16,
    form: OracleForm = FORMS["activation_oracle"],
) -> Oracle:
    return Oracle.of(
        random_lora(seed, modules), form=form, width=width, layers=tuple(range(layers))
    )


def random_probe(seed: int, *layers: int, width: int = 16) -> ConceptProbe:
    """Of two roles and three fillers, which it was never taught."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(width,), (width,), (8, width), (8,), (256, 8), (256,)]
    mean, scale, *rest = (torch.randn(shape, generator=generator) for shape in shapes)
    form = ProbeForm(
        roles=("colour", "shape"), fillers=("ball", "cube", "red"), dimensions=256, seed=seed
    )
    return ConceptProbe.of(CodeNetwork(mean, scale.exp(), *rest), form=form, layers=layers)


EXAMPLES: Mapping[ArtefactKind, Callable[[], Artefact]] = {
    "vector": lambda: random_vector(1, 2, 3),
    "low_rank": lambda: random_adapter(2, 2, 3),
    "sae": lambda: random_sae("standard", seed=3, layer=2),
    "lens": lambda: random_lens(4, 6),
    "affine": lambda: random_map(5, 2, 3),
    "detector": lambda: random_detector(6, 2),
    "oracle": lambda: random_oracle(6, {"model.layers.2.mlp.up_proj": (16, 32)}, 6),
    "probe": lambda: random_probe(7, 3, 4, 5),
}
"""One artefact of each kind, for a model of 6 layers and width 16, such as the fake engine's."""


def artefacts(width: int = 16, layers: int = 4) -> dict[str, Any]:
    """Vectors `v0` … `v5` on every layer, an SAE of each architecture and normalisation on layer 1,
    an adapter of each form and a map."""
    everywhere = range(layers)
    return {
        "vectors": {f"v{n}": random_vector(n, *everywhere, width=width) for n in range(6)},
        "saes": {
            name: random_sae(name, seed=50 + n, width=width)
            for n, name in enumerate((*SAE_NAMES, *COMPETING_NAMES))
        },
        "low_ranks": {
            "lora": random_adapter(90, *everywhere, width=width),
            "rectified": rectified_adapter(91, *everywhere, width=width),
        },
        "maps": {"map": random_map(92, *everywhere, width=width)},
        "detectors": {
            "d0": random_detector(93, 0, width=width, bias=0.3, threshold=0.4),
            "d1": random_detector(94, 0, width=width, bias=-0.2, threshold=-0.3),
            "d2": random_detector(93, 0, width=width, detection=Detection(pooling="max", last=3)),
            "d3": random_detector(94, 0, width=width, detection=Detection(pooling="mean", last=4)),
        },
    }


SCOPES: tuple[GateScope, ...] = get_args(GateScope)
"""Of gates, all there are."""


def random_detection(draw: random.Random) -> dict[str, Any]:
    """A gate by one of the detectors of `artefacts`, which read the first layer."""
    threshold = {"threshold": draw.uniform(-2, 2)} if draw.random() < 0.6 else {}
    return {
        "detector": draw.choice(["d0", "d1", "d2", "d3"]),
        **threshold,
        "scope": draw.choice(SCOPES),
    }


def random_where(draw: random.Random, vocabulary: int = 64) -> dict[str, Any] | None:
    """Any selection: phases, windows, token triggers, exceptions."""
    where: dict[str, Any] = {}
    if draw.random() < 0.4:
        where["phases"] = [draw.choice(["prompt", "generation"])]
    if draw.random() < 0.4:
        start = draw.randrange(-4, 6)
        where["positions"] = [[start, draw.choice([None, start + 3 if start >= 0 else None])]]
    if draw.random() < 0.2:
        where["tokens"] = sorted(draw.sample(range(vocabulary), vocabulary // 2))
    if draw.random() < 0.3:
        where["except"] = draw.choice([{"positions": [[0, 2]]}, {"tokens": [1, 2, 3]}])
    return where or None


def random_intervention(draw: random.Random, layers: int = 4) -> dict[str, Any]:
    """Any kind but `concept`, on one or two layers."""
    kind = draw.choice([kind for kind in KINDS if kind != "concept"])
    first, second = (f"v{n}" for n in draw.sample(range(6), 2))
    strength = round(draw.uniform(-2, 2), 3) or 0.5  # 0 compiles to no edit
    fields: dict[str, dict[str, Any]] = {
        "add": {"vector": first, "strength": draw.choice([strength, {"norm": strength / 4}])},
        "ablate": {"vector": first, "strength": strength},
        "project": {
            "vector": first,
            "value": strength,
            "mode": draw.choice(["set", "at_least", "at_most"]),
        },
        "clamp": {
            "sae": (sae := draw.choice(SAE_NAMES)),
            "features": draw.sample(range(64), 5),
            **MODES[draw.choice([mode for mode in MODES if allowed(sae, mode)])],
        },
        "swap": {"remove": first, "add": second, "strength": strength / 4},
        "exchange": {
            "vector": first,
            "toward": second,
            "mode": draw.choice(["move", "both", "one_way"]),
            "strength": strength,
        },
        "read_write": {
            "read": first,
            "write": second,
            "measure": draw.choice(["product", "projection", "cosine"]),
            "bias": strength / 20,
            "activation": draw.choice(["relu", "linear"]),
            "strength": draw.choice([strength / 4, {"norm": strength / 4}]),
        },
        "low_rank": {"adapter": draw.choice(["lora", "rectified"])},
        "affine": {"map": "map", "strength": strength / 2},
        "rotate": {
            "vector": first,
            "toward": second,
            "degrees": 60 * strength,
            "mode": draw.choice(["by", "to"]),
            "only": draw.choice([None, "positive"]),
        },
        "patch": {"vector": first},
    }
    placed = {} if kind == "clamp" else {"layers": sorted(draw.sample(range(layers), 2))}
    if fields[kind].get("mode") == "both":
        placed = {"layers": placed["layers"][:1]}  # a second layer would take the exchange back
    return {"kind": kind, **fields[kind], **placed}


SPAN_TEXTS = ("<", "<<", "ab", "<a>", "</a>", "a", "ba<", ">")
SPAN_PIECES = ("", "<", ">", "a", "b", "/", "ab", "</", "a>", "<a", "<<", "ba", "</a>", "<a>b")


def span_vocabulary(size: int = 64) -> list[bytes]:
    """Tokens of few letters, in which the texts of `random_spans` often lie, and lie in pieces."""
    return [SPAN_PIECES[token % len(SPAN_PIECES)].encode() for token in range(size)]


def random_spans(draw: random.Random, vocabulary: int = 64) -> dict[str, Any]:
    """A `where` that looks for texts, token ids and messages, or counts tokens."""

    def ids() -> list[int]:
        return [draw.randrange(vocabulary // 8) for _ in range(draw.randint(1, 2))]

    def mark() -> Any:
        return draw.choice(SPAN_TEXTS) if draw.random() < 0.8 else ids()

    def pair() -> list[Any]:
        if draw.random() < 0.2:
            return [ids(), ids()]
        return [draw.choice(SPAN_TEXTS), draw.choice([*SPAN_TEXTS, None])]

    made: dict[str, Any] = {
        "after": [mark() for _ in range(draw.randint(1, 2))],
        "before": [mark() for _ in range(draw.randint(1, 2))],
        "between": [pair() for _ in range(draw.randint(1, 2))],
        "outside": [pair() for _ in range(draw.randint(1, 2))],
        "every": draw.choice([{"nth": 2}, {"first": 3}, {"nth": 3, "first": 5}]),
        "roles": draw.sample(ROLES, draw.randint(1, 3)),
    }
    names = draw.sample(sorted(made), draw.choice([1, 1, 2]))
    where = {name: made[name] for name in names}
    if draw.random() < 0.3:
        name = draw.choice([name for name in made if name not in where])
        where["except"] = {name: made[name]}
    return where


def random_roles(draw: random.Random, length: int) -> RoleRanges:
    """A chat's messages, with a template's marks between them."""
    spans: list[tuple[int, int, Role]] = []
    start = draw.randint(0, 2)
    while start < length:
        end = min(start + draw.randint(1, 4), length)
        spans.append((start, end, draw.choice(ROLES)))
        start = end + draw.randint(0, 2)
    return RoleRanges(length, tuple(spans))


def random_spec(draw: random.Random, *, layers: int = 4, longest: int = 5) -> dict[str, Any]:
    """One to `longest` interventions, with selections on some of them and on the whole."""
    items = []
    for _ in range(draw.randint(1, longest)):
        item = random_intervention(draw, layers)
        if draw.random() < 0.4 and (where := random_where(draw)):
            item["where"] = where
        items.append(item)
    spec: dict[str, Any] = {"interventions": items}
    if draw.random() < 0.4 and (where := random_where(draw)):
        spec["where"] = where
        for item in items:  # two exceptions make one only where they are of one form
            own = item.get("where", {})
            if own.keys() == {"except"} and where.get("except", own["except"]) != own["except"]:
                del item["where"]
    if draw.random() < 0.25:
        spec["norm"] = "preserve"
    _add_ramps(spec)
    return spec


def random_ramp(draw: random.Random) -> list[list[float]]:
    """The points of a ramp over the first tokens that are generated."""
    tokens = sorted(draw.sample(range(9), draw.randint(1, 4)))
    return [[token, draw.choice([0, 1, round(draw.uniform(0.05, 1), 3)])] for token in tokens]


def _add_ramps(spec: dict[str, Any]) -> None:
    """Puts ramps into some specs. What is drawn here follows from the spec alone, so that what is
    drawn after it is as it would be without."""
    draw = random.Random(repr(spec))
    for part in (spec, *spec["interventions"]):
        if draw.random() < 0.12:
            part["ramp"] = random_ramp(draw)
