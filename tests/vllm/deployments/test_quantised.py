"""Quantised weights: the stream is not quantised, so that edits arrive in it as they are.

The demo model's weights are quantised here, as quantisers do it, and vLLM runs them in child
processes. What it makes of them is compared with the transformers engine on the weights that the
quantised numbers stand for. Beside them run weights of 16 bits, of which heads and neurons are
looked at in the same way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import architecture_runner
import inside_answers
import pytest
import torch
from artefacts import random_vector
from quantised import FORMATS, write_quantised
from safetensors.torch import load_file
from torch import Tensor
from vllm_engine import DEMO_MODEL

from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.vllm.static.rows import budget_rows
from steer.engines.vllm.ticket import CaptureOrder, Ticket
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.file import dump_plan
from steer.registry.blobs.plan_store import PlanStore
from steer.spec import parse_spec

LAYERS, WIDTH, LAYER, STRENGTH = 6, 192, 2, 3.0
VECTOR = random_vector(5, LAYER, width=WIDTH)
ADD = {"kind": "add", "vector": "v", "layers": [LAYER], "strength": STRENGTH}
SPECS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "add": {"interventions": [ADD]},
    "ablate": {"interventions": [{"kind": "ablate", "vector": "v", "layers": [LAYER]}]},
    "turned": {"interventions": [ADD], "norm": "preserve"},
}
PROMPT = tuple(torch.randint(3, 3072, (24,), generator=torch.Generator().manual_seed(3)).tolist())
POINTS = tuple(HookPoint(n, site) for n in range(LAYERS) for site in ("resid_pre", "resid_post"))
ARRIVES = HookPoint(LAYER + 1, "resid_pre")
"""What the layer behind the edit reads."""
ERROR = 0.05
"""Of states and logits, as a share of the largest: activations in bfloat16, or of eight bits."""
HALF = ("bfloat16", "float16")
INSIDE = {"bfloat16": 0.06, "float16": 0.005}
"""The same of what heads and neurons are made of: of fewer numbers, with a largest of their own."""
ROUNDS = {"compressed-tensors W8A8": 0.06, "compressed-tensors FP8": 0.125}
"""Formats in which matrices also quantise what they read, and how far their numbers may be then:
an eight-bit float has four bits, and a neuron is a product of two."""


@dataclass
class Runs:
    """What came of each format: states and logits by `spec/point`, and by `spec/logits`."""

    wanted: dict[str, dict[str, Tensor]]
    inside: dict[str, dict[str, Tensor]]
    found: dict[str, dict[str, Tensor]]
    answers: dict[str, Any]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("quantised")
    store, wanted, inside, jobs = PlanStore(root), {}, {}, {}
    for number, (name, form) in enumerate(FORMATS.items()):
        quantised, meant = write_quantised(root / str(number), DEMO_MODEL, form)
        requests, wanted[name], inside[name] = reference(meant, store)
        jobs[name] = root / f"{number}.job"
        job = {
            "requests": requests,
            "model": str(quantised),
            "dtype": form.dtype,
            "max_num_seqs": 8,
            "compiled": False,
            "inside": True,
            "out": str(root / f"{number}.json"),
        }
        jobs[name].write_text(json.dumps(job))
    for dtype in HALF:
        with TransformersEngine.load(DEMO_MODEL, name="steer-demo", dtype=dtype) as engine:
            inside[dtype] = inside_answers.matrices(engine)
        jobs[dtype] = root / f"{dtype}.job"
        plain = {"requests": [], "model": str(DEMO_MODEL), "dtype": dtype}
        out = str(root / f"{dtype}.json")
        jobs[dtype].write_text(json.dumps({**job, **plain, "out": out}))
    environment = {
        **os.environ,
        "VLLM_PLUGINS": "steer",
        "STEER_REGISTRY": str(root),
        "PYTHONPATH": os.pathsep.join(one for one in sys.path if "tests/support" in one),
    }
    command = [sys.executable, architecture_runner.__file__, *map(str, jobs.values())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found, answers = {}, {}
    for name, job_file in jobs.items():
        answer = job_file.with_suffix(".json")
        answers[name] = json.loads(answer.read_text()) if answer.exists() else done.stderr[-9000:]
        if answer.with_suffix(".safetensors").exists():
            found[name] = load_file(answer.with_suffix(".safetensors"))
    return Runs(wanted, inside, found, answers)


def reference(
    model: Path, store: PlanStore
) -> tuple[list[dict[str, Any]], dict[str, Tensor], dict[str, Tensor]]:
    """The requests for vLLM, what the transformers engine makes of them, and what it sees in heads
    and neurons."""
    with TransformersEngine.load(model, name="steer-demo") as engine:
        cache = PlanCache(MemoryLibrary({"v": VECTOR}), engine.info, engine.capabilities)
        plans = {
            name: None if spec is None else cache.plan(parse_spec(spec))
            for name, spec in SPECS.items()
        }
        captured = engine.capture(
            CaptureRequest([PROMPT] * len(plans), POINTS, plans=[*plans.values()], logits="last")
        )
        inside = inside_answers.matrices(engine)
    wanted, requests = {}, []
    order = CaptureOrder(POINTS, tuple(range(len(PROMPT))))
    for (name, plan), made in zip(plans.items(), captured, strict=True):
        assert made.logits is not None
        wanted[f"{name}/logits"] = made.logits[0]
        wanted |= {f"{name}/{point}": states for point, states in made.states.items()}
        ticket = Ticket(name, capture=order)
        if plan is not None:
            ticket = Ticket(
                name,
                fingerprint=plan.fingerprint,
                plan=store.put(dump_plan(plan)),
                rows=budget_rows(plan),
                selections=plan.selections,
                capture=order,
            )
        requests.append(
            {
                "name": name,
                "key": name,
                "prompt": list(PROMPT),
                "extra_args": ticket.as_extra_args(),
                "last": str(POINTS[-1]),
            }
        )
    return requests, wanted, inside


def of(runs: Runs, name: str) -> dict[str, Tensor]:
    kernel = FORMATS[name].kernel if name in FORMATS else None
    if kernel and not has_kernel(kernel):
        assert kernel in runs.answers[name]["message"]
        pytest.skip(f"not here: vLLM's build for this processor has no {kernel}")
    assert name in runs.found, runs.answers[name]
    return runs.found[name]


def has_kernel(name: str) -> bool:
    """Whether this build of vLLM has the operator."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    return hasattr(torch.ops._C, name)


def difference(actual: Tensor, wanted: Tensor) -> float:
    """The largest error as a share of the largest value."""
    return float((actual - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", FORMATS)
def test_an_edit_arrives_as_it_is(runs: Runs, name: str) -> None:
    """s·v is what is added, to the rounding of the dtype that the stream is kept in."""
    found, dtype = of(runs, name), getattr(torch, FORMATS[name].dtype)
    before, after = found[f"plain/{ARRIVES}"], found[f"add/{ARRIVES}"]
    shift = STRENGTH * VECTOR[LAYER]
    unit = torch.finfo(dtype).eps * torch.maximum(before.abs(), after.abs()).amax()
    assert (after - before - shift).abs().max() <= 2 * unit
    below = [point for point in POINTS if point.layer <= LAYER and point != POINTS[2 * LAYER + 1]]
    assert all(torch.equal(found[f"add/{p}"], found[f"plain/{p}"]) for p in below)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("spec", SPECS)
def test_states_and_logits_are_those_of_what_the_weights_mean(
    runs: Runs, name: str, spec: str
) -> None:
    found, wanted = of(runs, name), runs.wanted[name]
    for entry in [entry for entry in wanted if entry.startswith(f"{spec}/")]:
        assert difference(found[entry], wanted[entry]) < ERROR, entry
    if spec in ("add", "turned"):
        moved = difference(wanted[f"{spec}/logits"], wanted["plain/logits"])
        assert moved > 10 * ERROR


@pytest.mark.parametrize("name", [*FORMATS, *HALF])
def test_heads_and_neurons_are_those_of_what_the_weights_mean(runs: Runs, name: str) -> None:
    """Where a matrix quantises what it reads, no channel has a column of its own: that is refused
    where it is further off than 16 bits round, as floats of eight bits are; and so is a block that
    by itself rounds to other numbers than in a pass. The rest is told."""
    made = of(runs, name)
    found = {key.removeprefix("inside/"): one for key, one in made.items() if "inside/" in key}
    refusals = runs.answers[name]["refusals"]
    wanted = {key: one for key, one in runs.inside[name].items() if key not in refusals}
    projections = {key for key in runs.inside[name] if key.startswith("behind ")}
    codes = {key: "no_projection" if key in projections else "cannot_carry" for key in refusals}
    assert refusals == codes
    if name == "compressed-tensors FP8":
        assert {*refusals} >= projections
    assert name in ROUNDS or not refusals
    dtype = FORMATS[name].dtype if name in FORMATS else name
    inside_answers.assert_near(found, wanted, ROUNDS.get(name) or INSIDE[dtype])
