"""Answers bound to a JSON schema, each by its own, steered or not, in one batch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from artefacts import random_vector
from together import complete_together
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from steer.artefacts.library import MemoryLibrary
from steer.engines.base import GenerationRequest, SamplingParams
from steer.engines.plans import plans_of
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.spec import parse_spec

END = 256
SCHEMAS: list[tuple[dict[str, Any], type]] = [
    ({"enum": ["yes", "no", "perhaps"]}, str),
    (
        {
            "type": "object",
            "properties": {"name": {"enum": ["a", "b"]}, "age": {"enum": [1, 22]}},
            "required": ["name", "age"],
            "additionalProperties": False,
        },
        dict,
    ),
    ({"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}, list),
]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: place for place, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=264,  # some rows beyond the tokenizer's, as models have them
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=END,
    )
    model = LlamaForCausalLM(config).eval()
    with TransformersEngine(model, byte_tokenizer(), rows=16, slots=4) as running:
        yield running


def steered(engine: TransformersEngine, strength: float = 2.0, **where: Any) -> Any:
    library = MemoryLibrary({"v": random_vector(1, 0, 1, width=32)})
    item = {"kind": "add", "vector": "v", "layers": [0], "strength": strength}
    spec = {"interventions": [item], **({"where": where} if where else {})}
    return plans_of(engine, library).plan(parse_spec(spec))


def test_every_answer_is_json_of_its_own_schema(engine: TransformersEngine) -> None:
    plan = steered(engine)
    requests = [
        GenerationRequest(
            f"{place} {temperature}",
            (10, 11, 12 + place),
            SamplingParams(
                max_tokens=60,
                temperature=temperature,
                seed=3,
                logprobs=1,
                json_schema=json.dumps(schema),
                repetition_penalty=1.2,
                # What is forbidden stays so, however much a client wants it.
                logit_bias=((7, 100.0),),
            ),
            plan if place % 2 else None,
        )
        for temperature in (0.0, 1.5)
        for place, (schema, _) in enumerate(SCHEMAS)
    ]
    plain = GenerationRequest("plain", (10, 11), SamplingParams(max_tokens=20, temperature=0))
    alone = engine.complete([plain])[0]
    *done, beside = complete_together(engine, [*requests, plain])
    assert beside.tokens == alone.tokens
    for request, found in zip(requests, done, strict=True):
        schema, kind = SCHEMAS[int(request.id[0])]
        answer = json.loads(engine.tokenizer.decode(found.tokens))
        assert found.finish == "stop"
        assert isinstance(answer, kind)
        if "enum" in schema:
            assert answer in schema["enum"]
        assert (found.receipt is not None) is (request.plan is not None)


def test_the_engine_says_that_it_can(engine: TransformersEngine) -> None:
    assert "response_format" in engine.capabilities.sampling


@pytest.mark.parametrize(
    ("schema", "code"),
    [
        ("{", "invalid_schema"),
        ('{"type": "nonsense"}', "invalid_schema"),
        ('{"if": {"type": "string"}}', "invalid_schema"),
        (json.dumps({"description": "x" * 70_000}), "invalid_schema"),
        (json.dumps({"$ref": "https://example.org/schema"}), "invalid_schema"),
    ],
)
def test_schemas_that_cannot_be_followed_are_refused(
    engine: TransformersEngine, schema: str, code: str
) -> None:
    with pytest.raises(SteerError) as caught:
        engine.admit(GenerationRequest("x", (5,), SamplingParams(json_schema=schema)))
    assert caught.value.code == code


@pytest.mark.parametrize("fields", [{"min_tokens": 3}, {"ignore_eos": True}])
def test_who_says_where_an_answer_ends_cannot_bind_it(
    engine: TransformersEngine, fields: dict[str, Any]
) -> None:
    sampling = SamplingParams(json_schema="{}", **fields)
    with pytest.raises(SteerError) as caught:
        engine.admit(GenerationRequest("x", (5,), sampling))
    assert caught.value.param == "/" + next(iter(fields))


def test_an_answer_that_the_spec_leaves_out_is_the_same_to_the_byte(
    engine: TransformersEngine,
) -> None:
    """All of it, from the brace that opens it: not even that one is steered."""
    everywhere = steered(engine, 60.0, phases=["generation"])
    spared = steered(engine, 60.0, phases=["generation"], outside=[["{", None]])
    schema, _ = SCHEMAS[1]
    requests = [
        GenerationRequest(
            f"{n} {name}",
            tuple(range(40 + n, 50 + n)),
            SamplingParams(
                max_tokens=60, temperature=0, logprobs=0, json_schema=json.dumps(schema)
            ),
            plan,
        )
        for n in range(12)
        for name, plan in (("plain", None), ("spared", spared), ("everywhere", everywhere))
    ]
    done = complete_together(engine, requests)
    changed = 0
    for plain, kept, other in zip(done[::3], done[1::3], done[2::3], strict=True):
        assert kept.tokens == plain.tokens
        for mine, theirs in zip(kept.logprobs, plain.logprobs, strict=True):
            assert abs(mine.logprob - theirs.logprob) <= 1e-5
        assert kept.receipt is not None
        assert kept.receipt.tokens_steered == 0
        changed += other.tokens != plain.tokens
    assert changed >= 3, "steering would not have changed the answers anyway"
