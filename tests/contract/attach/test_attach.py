"""`attach`: the same steering around a model's own `generate`, and nothing left behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from artefacts import random_jacobians, random_map, random_vector
from tiny_models import ARCHITECTURES, LAYERS, VOCABULARY, WIDTH, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from torch import nn

import steer
from steer.artefacts.library import MemoryLibrary
from steer.artefacts.sae.base import SAE
from steer.engines.base import CaptureRequest, GenerationRequest, SamplingParams
from steer.engines.plans import plans_of
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SpecError, SteerError
from steer.spec import parse_spec

TinyModel = Callable[[str], nn.Module]
VECTORS = {f"v{n}": random_vector(n, *range(LAYERS), width=WIDTH) for n in range(3)}
MAPS = {"map": random_map(50, 0, 1, width=WIDTH)}
LENSES = {"disposed": random_jacobians(51, LAYERS, WIDTH)}
ADD: dict[str, Any] = {"kind": "add", "vector": "v0", "layers": [0, 1], "strength": 1.5}
SPECS: dict[str, dict[str, Any]] = {
    "everything": {"interventions": [ADD]},
    "generation": {"interventions": [ADD], "where": {"phases": ["generation"]}},
    "prompt": {"interventions": [ADD], "where": {"phases": ["prompt"]}},
    "window": {"interventions": [ADD], "where": {"positions": [[-2, 14]]}},
    "schedule": {"interventions": [ADD], "where": {"every": {"nth": 2, "first": 7}}},
    "tokens": {"interventions": [ADD], "where": {"tokens": list(range(0, VOCABULARY, 2))}},
    "prompt gate": {
        "interventions": [{**ADD, "layers": [1]}],
        "when": {"vector": "v1", "above": 0.0, "layer": 0},
        "where": {"phases": ["generation"]},
    },
    "new kinds": {
        "interventions": [
            {"kind": "affine", "map": "map"},
            {"kind": "read_write", "read": "v1", "write": "v2", "measure": "cosine"}
            | {"strength": {"norm": 4.0}, "layers": [0, 1]},
            {"kind": "exchange", "vector": "v0", "toward": "v1", "mode": "both", "layers": [1]},
            {"kind": "rotate", "vector": "v0", "toward": "v2", "degrees": 120, "mode": "to"}
            | {"layers": [0, 2]},
        ]
    },
    "tokens of lenses": {
        "interventions": [
            {"kind": "add", "vector": {"token": 7}, "strength": {"norm": 0.5}, "layers": [0]},
            {"kind": "ablate", "vector": {"token": 9, "lens": "disposed"}, "layers": [1]},
        ]
    },
    "token gate": {
        "interventions": [{"kind": "ablate", "vector": "v2", "layers": [1, 2]}],
        "when": {"vector": "v1", "above": 0.0, "layer": 0, "scope": "token"},
    },
}


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> list[list[int]]:
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[list[int]] = out[:, ids.shape[1] :].tolist()
    return tokens


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", SPECS)
def test_attach_gives_the_engines_tokens_and_receipts(
    tiny_model: TinyModel, architecture: str, name: str
) -> None:
    """A left-padded batch, against the engine one prompt after another."""
    # A seed at which no two experts of the mixture tie to the last bit of float32.
    model, draw = tiny_model(architecture), random.Random(8)
    prompts = [
        tuple(draw.randrange(3, VOCABULARY) for _ in range(length)) for length in (9, 4, 12, 1)
    ]
    ids = torch.tensor([[0] * (12 - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (12 - len(p)) + [1] * len(p) for p in prompts])
    with TransformersEngine(model, None, rows=4, slots=2) as engine:
        library = MemoryLibrary(VECTORS, maps=MAPS, lenses=LENSES)
        compiled = plans_of(engine, library).plan(parse_spec(SPECS[name]))
        sampling = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
        wanted = [
            engine.complete([GenerationRequest("x", p, sampling, compiled)])[0] for p in prompts
        ]

    made = {"vectors": VECTORS, "maps": MAPS, "lenses": LENSES}
    with steer.attach(model, SPECS[name], **made) as attached:
        tokens = generate(model, ids, mask)

    assert [tuple(row) for row in tokens] == [done.tokens for done in wanted]
    for mine, done in zip(attached.receipts, wanted, strict=True):
        assert done.receipt is not None
        assert (mine.tokens_steered, mine.tokens_skipped) == (
            done.receipt.tokens_steered,
            done.receipt.tokens_skipped,
        )
        assert mine.hook_points == done.receipt.hook_points
        assert [gate.fired for gate in mine.gates] == [gate.fired for gate in done.receipt.gates]
    assert hooks_on(model) == 0


def test_a_model_is_as_it_was_afterwards(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    ids = torch.arange(3, 15)[None]
    before = model(input_ids=ids).logits
    with steer.attach(model, SPECS["everything"], vectors=VECTORS):
        assert not torch.equal(model(input_ids=ids).logits, before)
    assert hooks_on(model) == 0
    assert torch.equal(model(input_ids=ids).logits, before)


def test_a_model_is_unhooked_after_an_error(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    with (
        pytest.raises(RuntimeError, match="in the block"),
        steer.attach(model, SPECS["everything"], vectors=VECTORS),
    ):
        raise RuntimeError("in the block")
    assert hooks_on(model) == 0
    with (
        pytest.raises(IndexError),
        steer.attach(model, SPECS["everything"], vectors=VECTORS),
    ):
        model(input_ids=torch.tensor([[VOCABULARY + 5]]))
    assert hooks_on(model) == 0


def test_a_spec_that_does_not_fit_leaves_no_hook(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    spec = {"interventions": [{**ADD, "vector": "nobody"}]}
    with pytest.raises(SteerError, match="nobody"), steer.attach(model, spec, vectors=VECTORS):
        pass
    assert hooks_on(model) == 0


def test_a_pass_that_failed_does_not_disturb_the_next(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    ids = torch.arange(3, 15)[None]
    with steer.attach(model, SPECS["everything"], vectors=VECTORS) as attached:
        wanted = model(input_ids=ids).logits
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[VOCABULARY + 5]]))
        assert torch.equal(model(input_ids=ids).logits, wanted)
        assert attached.receipts[0].tokens_steered == 12


def test_attachments_nest(tiny_model: TinyModel) -> None:
    """Two constants, one attachment inside the other, are their sum."""
    model = tiny_model("gpt2")
    ids = torch.arange(3, 15)[None]
    other = {**ADD, "vector": "v1", "layers": [2]}
    with steer.attach(model, {"interventions": [ADD, other]}, vectors=VECTORS):
        wanted = model(input_ids=ids).logits
    with steer.attach(model, {"interventions": [ADD]}, vectors=VECTORS):
        with steer.attach(model, {"interventions": [other]}, vectors=VECTORS):
            assert torch.allclose(model(input_ids=ids).logits, wanted, atol=1e-5)
        assert not torch.allclose(model(input_ids=ids).logits, wanted, atol=1e-3)
    assert hooks_on(model) == 0


def test_a_window_that_ends_while_generating_ends(tiny_model: TinyModel) -> None:
    """The step of the last selected token must not be used again for the one after it."""
    model = tiny_model("llama")
    with steer.attach(model, SPECS["window"], vectors=VECTORS) as attached:
        generate(model, torch.arange(3, 15)[None])
    receipt = attached.receipts[0]
    assert (receipt.tokens_steered, receipt.tokens_skipped) == (4, 12 + 8 - 1 - 4)


def test_token_strings_need_the_tokenizer(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    ids = torch.tensor([[5, 6, 7, 6]])
    spec = {"interventions": [ADD], "where": {"tokens": ["w6"]}}
    with steer.attach(model, spec, vectors=VECTORS, tokenizer=tiny_tokenizer()) as attached:
        model(input_ids=ids)
    assert attached.receipts[0].tokens_steered == 2
    with pytest.raises(SpecError, match="no tokenizer"), steer.attach(model, spec, vectors=VECTORS):
        pass


def test_padding_on_the_right_is_refused(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    with (
        steer.attach(model, SPECS["everything"], vectors=VECTORS),
        pytest.raises(SpecError, match="padding_side"),
    ):
        model(input_ids=torch.tensor([[5, 6, 0]]), attention_mask=torch.tensor([[1, 1, 0]]))
    assert hooks_on(model) == 0


def test_a_concept_is_read_as_the_engine_reads_it(tiny_model: TinyModel) -> None:
    """With the tokenizer's special tokens around the text: one spec, one vector."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    assert tokenizer.encode("w5 w6") == [1, 5, 6]
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(2, 12, WIDTH, generator=generator)
    sae = SAE.of(
        "standard",
        W_enc=rows[0].T,
        b_enc=torch.zeros(12),
        W_dec=rows[1],
        b_dec=torch.zeros(WIDTH),
        layer=1,
    )
    model = tiny_model("llama")
    concept = {"kind": "concept", "sae": "s", "text": "w5 w6", "contrast": "w9", "strength": 0.5}
    spec, prompt = {"interventions": [concept]}, (7, 8, 9, 10)
    with TransformersEngine(model, tokenizer, rows=1, slots=1) as engine:
        plan = plans_of(engine, MemoryLibrary({}, {"s": sae})).plan(parse_spec(spec))
        asked = CaptureRequest([prompt], plans=[plan], logits="all")
        wanted = engine.capture(asked)[0].logits
    with steer.attach(model, spec, saes={"s": sae}, tokenizer=tokenizer):
        logits = model(input_ids=torch.tensor([prompt])).logits[0]
    assert wanted is not None
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("where", "code"),
    [({"after": ["a"]}, "texts_unsupported"), ({"roles": ["user"]}, "roles_unsupported")],
)
def test_what_stands_before_a_row_is_not_followed(
    tiny_model: TinyModel, where: dict[str, Any], code: str
) -> None:
    """Rows of somebody else's loop may change places (beams): nobody can say what one has read."""
    spec = {"interventions": [ADD], "where": where}
    with (
        pytest.raises(SteerError) as caught,
        steer.attach(tiny_model("llama"), spec, vectors=VECTORS),
    ):
        pass
    assert caught.value.code == code
