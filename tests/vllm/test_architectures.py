"""Every architecture that vLLM steers, against the transformers engine on the same weights.

The models are random and small; vLLM runs in child processes. Each model serves one batch in which
every request is steered in another way, and all states of all requests are captured.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from artefacts import random_vector
from safetensors.torch import load_file
from tiny_models import LAYERS, VOCABULARY
from torch import Tensor
from vllm_models import ARCHITECTURES, ENDS, HALF, REFUSED, WIDTH, Architecture, write

from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.vllm.static.rows import budget_rows
from steer.engines.vllm.ticket import CaptureOrder, Ticket
from steer.errors import Unsupported
from steer.model import Capabilities, HookPoint, ModelInfo
from steer.plan.cache import PlanCache
from steer.plan.file import dump_plan
from steer.plan.plan import SteeringPlan
from steer.registry.blobs.plan_store import PlanStore
from steer.spec import KINDS, Site, parse_spec

RUNNER = Path(__file__).parents[1] / "support" / "vllm_side" / "architecture_runner.py"
CHOICE = "STEER_ARCHITECTURES"
"""An environment variable: `all`, some minutes more, or names separated by commas."""
USUAL = ("llama", "gemma2", "mixtral", "gpt2", "granite", "olmo2", "falcon-h1", "lfm2", "gemma4",
         "gpt-oss", "bloom", "paddleocr-vl")  # fmt: skip
"""One or more for each layout, with and without experts, of vLLM's own code and of transformers,
and of layers that nobody read; for each way of making weights of scores."""
NAMES = {"": USUAL, "all": tuple(ARCHITECTURES)}.get(
    choice := os.environ.get(CHOICE, ""), tuple(choice.split(","))
)
COMPILED = tuple(name for name in ("gemma2", "gpt2", "falcon-h1") if name in NAMES)
NARROW = tuple(name for name in ("llama",) if name in NAMES)
ENGINES = (
    *NAMES,
    *(f"compiled-{name}" for name in COMPILED),
    *(f"narrow-{name}" for name in NARROW),
)
TOLERANCE = 1e-4
PROMPT = tuple(
    torch.randint(3, VOCABULARY, (12,), generator=torch.Generator().manual_seed(3)).tolist()
)
STEERED_LAYERS = [0, 2]
EDITS: dict[str, dict[str, Any]] = {
    "add": {"interventions": [{"kind": "add", "vector": "v", "layers": STEERED_LAYERS}]},
    "ablate": {"interventions": [{"kind": "ablate", "vector": "v", "layers": STEERED_LAYERS}]},
    "turned": {
        "interventions": [{"kind": "add", "vector": "v", "layers": STEERED_LAYERS}],
        "norm": "preserve",
    },
}
CARRIED: tuple[tuple[Site, Site], ...] = (
    ("resid_pre", "head_out"),
    ("resid_pre", "resid_post"),
    ("resid_mid", "mlp_act"),
    ("resid_mid", "resid_post"),
    ("head_out", "attn_out"),
    ("mlp_act", "mlp_out"),
)
INSIDE = ("/queries", "/keys", ".weights", ".values")
"""How entries end that tell of the inside of attention: their tests ask where they are told."""
QUERIED = 1
QUERIED_STATES = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(8))
LAST = HookPoint(LAYERS - 1, "resid_post")
PLAIN = "plain"


@dataclasses.dataclass
class Runs:
    """What each engine made of each model: tensors named `request/point` and `request/logits`.

    In `found` models that vLLM compiled are named `compiled-…`, and one that takes a single request
    at a time `narrow-…`.
    """

    wanted: dict[str, dict[str, Tensor]]
    found: dict[str, dict[str, Tensor]]
    answers: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("models")
    wanted, jobs = {}, {}
    for name in NAMES:
        one = ARCHITECTURES[name]
        requests, wanted[name] = reference(one, root / name, PlanStore(root))
        jobs[name] = {"requests": requests, "model": str(root / name)}
        if name in COMPILED:
            jobs[f"compiled-{name}"] = {**jobs[name], "compiled": True}
    for name, one in {**REFUSED, **HALF}.items():
        write(one, root / name)
        dtype = "bfloat16" if name in HALF else "float32"
        jobs[name] = {"requests": [], "model": str(root / name), "dtype": dtype}
    jobs |= {f"narrow-{name}": {**jobs[name], "max_num_seqs": 1} for name in NARROW}
    for name, job in jobs.items():
        usual = {"max_num_seqs": 32, "dtype": "float32", "compiled": False}
        whole = {**usual, **job, "out": str(root / f"{name}.json")}
        (root / f"{name}.job").write_text(json.dumps(whole))
    environment = {
        **os.environ,
        "VLLM_PLUGINS": "steer",
        "STEER_REGISTRY": str(root),
        "VLLM_DISABLE_COMPILE_CACHE": "1",
    }
    command = [sys.executable, str(RUNNER), *(str(root / f"{name}.job") for name in jobs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    answers, found = {}, {}
    for name in jobs:
        answer = root / f"{name}.json"
        if not answer.exists():
            answers[name] = {"error": "crashed", "message": done.stderr[-20_000:]}
            continue
        answers[name] = json.loads(answer.read_text())
        if "info" in answers[name]:
            found[name] = load_file(answer.with_suffix(".safetensors"))
    return Runs(wanted, found, answers)


def reference(
    one: Architecture, folder: Path, store: PlanStore
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Writes the model; the requests for vLLM, and what the transformers engine makes of those
    that it can run."""
    with TransformersEngine(write(one, folder), None, rows=32, slots=32) as engine:
        # transformers does not find every site that vLLM has.
        widths = {**one.widths, "d_mlp": engine.info.d_mlp or one.widths["d_mlp"]}
        info = dataclasses.replace(engine.info, sites=one.sites, **widths)
        plans = {PLAIN: None, **plans_of(info)}
        points = points_of(info)
        requests = [request(name, plan, points, store, info) for name, plan in plans.items()]
        shared = {site for site in one.sites if site in engine.info.sites}
        points = tuple(point for point in points if point.site in shared)
        run = [name for name in plans if name == PLAIN or name.split("-")[0] in shared]
        captured = engine.capture(
            CaptureRequest(
                [PROMPT] * len(run), points, plans=[plans[name] for name in run], logits="last"
            )
        )
        wanted = attention_of(engine) | carried_of(engine, one.sites)
    for name, result in zip(run, captured, strict=True):
        assert result.logits is not None
        wanted[f"{name}/logits"] = result.logits[0]
        wanted |= {f"{name}/{point}": state for point, state in result.states.items()}
    return requests, wanted


def attention_of(engine: TransformersEngine) -> dict[str, Tensor]:
    """What the heads of every layer attend to in the prompt, and what those of one are handed of
    some states; nothing where it is not told."""
    layers = tuple(range(engine.info.n_layers))
    try:
        (told,) = engine.capture(CaptureRequest([PROMPT], attention=layers))
        handed = engine.queries_and_keys(QUERIED, QUERIED_STATES)
    except Unsupported:
        return {}
    return {
        f"{PLAIN}/queries": handed.queries,
        f"{PLAIN}/keys": handed.keys,
    } | {
        f"{PLAIN}/{layer}.{part}": getattr(one, part)
        for layer, one in told.attention.items()
        for part in ("weights", "values")
    }


def carried_of(engine: TransformersEngine, sites: tuple[Site, ...]) -> dict[str, Tensor]:
    """What a block by itself makes of some states, between each two of `sites` that are here."""
    found = {}
    for start, end in CARRIED:
        if {start, end} <= {*sites} & {*engine.info.sites}:
            points = HookPoint(QUERIED, start), HookPoint(QUERIED, end)
            states = carried_states(engine.info.width(start))
            found[f"{PLAIN}/{start} to {end}"] = engine.carry(*points, states)
    return found


def carried_states(width: int) -> Tensor:
    return torch.randn(7, width, generator=torch.Generator().manual_seed(9))


def plans_of(info: ModelInfo) -> dict[str, SteeringPlan]:
    """A plan for every edit at every site."""
    made = {}
    able = Capabilities("vllm", KINDS, info.sites)
    for site in info.sites:
        vector = random_vector(5, 0, width=info.width(site), site=site)
        cache = PlanCache(MemoryLibrary({"v": vector}), info, able)
        made |= {f"{site}-{edit}": cache.plan(parse_spec(spec)) for edit, spec in EDITS.items()}
    return made


def points_of(info: ModelInfo) -> tuple[HookPoint, ...]:
    return tuple(HookPoint(layer, site) for layer in range(info.n_layers) for site in info.sites)


def request(
    name: str,
    plan: SteeringPlan | None,
    points: tuple[HookPoint, ...],
    store: PlanStore,
    info: ModelInfo,
) -> dict[str, Any]:
    attended = any(point.site == "head_out" for point in points) and plan is None
    layers = tuple(range(LAYERS)) if attended else ()
    order = CaptureOrder(points, tuple(range(len(PROMPT))), layers, len(PROMPT))
    ticket = Ticket(name, capture=order)
    if plan is not None:
        ticket = Ticket(
            name,
            fingerprint=plan.fingerprint,
            plan=store.put(dump_plan(plan)),
            rows=budget_rows(plan),
            selections=tuple(one.selection for one in plan.rules),
            capture=order,
        )
    queried = {"queried": QUERIED, "states": QUERIED_STATES.tolist()} if attended else {}
    carried = []
    if plan is None:
        widths = {point.site: info.width(point.site) for point in points}
        carried = [
            [QUERIED, start, end, carried_states(widths[start]).tolist()]
            for start, end in CARRIED
            if {start, end} <= {*widths}
        ]
    return {
        **queried,
        "carried": carried,
        "name": name,
        "key": name,
        "prompt": list(PROMPT),
        "extra_args": ticket.as_extra_args(),
        "last": str(LAST),
    }


def plain_name(name: str) -> str:
    """The model that one of `ENGINES` runs."""
    return name.removeprefix("compiled-").removeprefix("narrow-")


def architecture(name: str) -> Architecture:
    return ARCHITECTURES[plain_name(name)]


def difference(actual: Tensor, wanted: Tensor) -> float:
    """The largest error as a share of the largest value."""
    return float((actual - wanted).abs().max() / wanted.abs().max())


def of(runs: Runs, name: str) -> dict[str, Tensor]:
    """What vLLM made of a model; fails with its message where it made nothing."""
    assert name in runs.found, runs.answers[name]["message"]
    return runs.found[name]


@pytest.mark.parametrize(
    "name", [name for name in ENGINES if "head_out" in architecture(name).sites]
)
def test_what_heads_attend_to_is_told(runs: Runs, name: str) -> None:
    """Beside edited requests: weights times values are `head_out`, and both what transformers
    attends with where it tells that."""
    made = of(runs, name)
    for layer in range(LAYERS):
        weights, values = made[f"{PLAIN}/{layer}.weights"], made[f"{PLAIN}/{layer}.values"]
        heads = (weights @ values).transpose(0, 1).flatten(1)
        assert difference(heads, made[f"{PLAIN}/{HookPoint(layer, 'head_out')}"]) < TOLERANCE
        for part, one in (("weights", weights), ("values", values)):
            wanted = runs.wanted[plain_name(name)].get(f"{PLAIN}/{layer}.{part}")
            if wanted is not None and architecture(name).alike:
                assert difference(one, wanted) < architecture(name).tolerance, (layer, part)


@pytest.mark.parametrize(
    "name", [name for name in ENGINES if "head_out" in architecture(name).sites]
)
def test_queries_and_keys_of_states_are_those_of_transformers(runs: Runs, name: str) -> None:
    """Of states that are put before a layer between two steps. One angle of a rotary embedding for
    queries and keys leaves their product as it is."""
    made, wanted = of(runs, name), runs.wanted[plain_name(name)]
    queries, keys = made[f"{PLAIN}/queries"], made[f"{PLAIN}/keys"]
    assert len(queries) == len(keys) == len(QUERIED_STATES)
    if f"{PLAIN}/queries" in wanted and architecture(name).alike:
        products = [
            torch.einsum("ihd,jhd->hij", one[f"{PLAIN}/queries"], one[f"{PLAIN}/keys"])
            for one in (made, wanted)
        ]
        assert difference(*products) < architecture(name).tolerance


@pytest.mark.parametrize("name", [name for name in ENGINES if architecture(name).alike])
def test_a_block_by_itself_makes_what_it_makes_in_transformers(runs: Runs, name: str) -> None:
    """Between two steps, whatever lies in it: caps, sinks, distances, norms of parts, experts. A
    mixer that is no attention of vLLM's is refused, where the way goes through it."""
    made, wanted = of(runs, name), runs.wanted[plain_name(name)]
    for key in [key for key in wanted if " to " in key]:
        if key in made:
            assert difference(made[key], wanted[key]) < architecture(name).tolerance, key
    if architecture(name).sites != ENDS:
        assert any(" to " in key for key in wanted)
        assert {key for key in wanted if " to " in key} <= {*made}


def test_transformers_tells_of_each_way_to_make_weights(runs: Runs) -> None:
    """The comparison above is one where windows, caps, sinks and distances matter."""
    for name in {"llama", "gemma2", "gpt-oss"} & {*NAMES}:
        assert f"{PLAIN}/0.weights" in runs.wanted[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_sites_are_those_of_the_family(runs: Runs, name: str) -> None:
    of(runs, name)
    assert tuple(runs.answers[name]["info"]["model"]["sites"]) == ARCHITECTURES[name].sites


@pytest.mark.parametrize("name", [name for name in ENGINES if architecture(name).alike])
def test_states_and_logits_are_those_of_transformers(runs: Runs, name: str) -> None:
    found, wanted = of(runs, name), runs.wanted[plain_name(name)]
    wrong = {
        entry: error
        for entry, tensor in wanted.items()
        if not (" to " in entry or entry.endswith(INSIDE))
        and not (error := difference(found[entry], tensor)) < architecture(name).tolerance
    }
    assert not wrong


@pytest.mark.parametrize("name", NAMES)
def test_every_edit_acts(runs: Runs, name: str) -> None:
    found = of(runs, name)
    for entry in {entry.split("/")[0] for entry in found} - {PLAIN}:
        assert difference(found[f"{entry}/logits"], found[f"{PLAIN}/logits"]) > 1e-2, entry


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_sum_to_the_stream(runs: Runs, name: str) -> None:
    """Also where transformers has no module that returns what a part adds."""
    found = of(runs, name)
    for layer in range(LAYERS):
        state = {site: found[f"{PLAIN}/{layer}.{site}"] for site in ARCHITECTURES[name].sites}
        if layer:
            before = found[f"{PLAIN}/{layer - 1}.resid_post"]
            assert difference(state["resid_pre"], before) < TOLERANCE
        if "resid_mid" in state:
            middle = state["resid_pre"] + state["attn_out"]
            assert difference(middle, state["resid_mid"]) < TOLERANCE
            after = state["resid_mid"] + state["mlp_out"]
            assert difference(after, state["resid_post"]) < TOLERANCE


@pytest.mark.parametrize(
    "name", [name for name in NAMES if "attn_out" in ARCHITECTURES[name].sites]
)
def test_adding_to_a_part_is_adding_to_the_stream(runs: Runs, name: str) -> None:
    found = of(runs, name)
    for part, stream in (("attn_out", "resid_mid"), ("mlp_out", "resid_post")):
        added, wanted = found[f"{part}-add/logits"], found[f"{stream}-add/logits"]
        assert difference(added, wanted) < TOLERANCE


@pytest.mark.parametrize("name", ENGINES)
def test_the_last_state_unembeds_to_the_logits(runs: Runs, name: str) -> None:
    found = of(runs, name)
    for entry in {entry.split("/")[0] for entry in found}:
        unembedded, logits = found[f"{entry}/unembedded"], found[f"{entry}/logits"]
        assert difference(unembedded, logits) < TOLERANCE, entry


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_engine_steers_like_an_eager_one(runs: Runs, name: str) -> None:
    compiled, eager = of(runs, f"compiled-{name}"), of(runs, name)
    assert runs.answers[f"compiled-{name}"]["info"]["compiled"]
    assert compiled.keys() == eager.keys()
    for entry, tensor in eager.items():
        assert difference(compiled[entry], tensor) < TOLERANCE, entry


@pytest.mark.parametrize("name", HALF)
def test_a_model_of_half_precision_proves_its_ends(runs: Runs, name: str) -> None:
    of(runs, name)
    assert tuple(runs.answers[name]["info"]["model"]["sites"]) == ENDS


@pytest.mark.parametrize("name", REFUSED)
def test_an_unknown_layer_is_refused_by_name(runs: Runs, name: str) -> None:
    answer = runs.answers[name]
    assert answer["error"] == "unsupported_architecture", answer["message"]
    assert REFUSED[name].layer in answer["message"]
