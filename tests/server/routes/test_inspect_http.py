"""Inspection over HTTP with the transformers engine over a tiny random model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch
from artefacts import random_oracle
from transformers import LlamaConfig, LlamaForCausalLM

from steer.artefacts.oracle_form import OracleForm
from steer.engines.fake.engine import ByteTokenizer
from steer.engines.transformers.engine import TransformersEngine

LAYERS = 4


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=ByteTokenizer.vocab_size,
        hidden_size=16,
        num_hidden_layers=LAYERS,
        intermediate_size=24,
        num_attention_heads=2,
        max_position_embeddings=96,
        initializer_range=0.3,
        eos_token_id=ByteTokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def engine(model: LlamaForCausalLM) -> Iterator[TransformersEngine]:
    with TransformersEngine(model, ByteTokenizer(), name="tiny", rows=8, slots=8) as running:
        yield running


def own_distribution(model: LlamaForCausalLM, text: str) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ByteTokenizer().encode(text)])).logits[0].softmax(-1)


async def test_a_lens_over_a_chat(http: httpx.AsyncClient, model: LlamaForCausalLM) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "layers": [0, LAYERS - 1], "top": 2}
    response = await http.post("/v1/inspect/logit-lens", json=body)
    assert response.status_code == 200, response.text
    found = response.json()
    assert found["tokens"] == ["<|bos|>", "<|user|>", "h", "i", "<|assistant|>"]
    assert "fingerprint" not in found
    ids = ByteTokenizer().encode("<|bos|><|user|>hi<|assistant|>", add_special_tokens=False)
    with torch.no_grad():
        own = model(torch.tensor([ids])).logits[0].softmax(-1)
    for cell in found["cells"][5:]:
        best = own[cell["position"]].topk(2)
        assert [entry["id"] for entry in cell["top"]] == best.indices.tolist()
        for entry, chance in zip(cell["top"], best.values.tolist(), strict=True):
            assert entry["probability"] == pytest.approx(chance, abs=1e-5)


async def test_a_patchscope_that_puts_a_state_back(
    http: httpx.AsyncClient, model: LlamaForCausalLM
) -> None:
    body = {
        "source": {"text": "the river"},
        "positions": ["river"],
        "preset": "custom",
        "target": {"text": "the river"},
        "expect": "token",
        "max_tokens": 3,
    }
    response = await http.post("/v1/inspect/patchscope", json=body)
    assert response.status_code == 200, response.text
    found = response.json()
    own = own_distribution(model, "the river")[-1]
    assert len(found["cells"]) == LAYERS
    for cell in found["cells"]:
        assert cell["text"] == found["baseline"]["text"]
        assert cell["expected"]["token"] == "r"
        for entry in cell["top"]:
            assert entry["probability"] == pytest.approx(float(own[entry["id"]]), abs=1e-5)
    assert [row["layer"] for row in found["precision"]] == list(range(LAYERS))


async def test_activations_under_steering(http: httpx.AsyncClient, joy: dict[str, Any]) -> None:
    body = {"text": "a river", "vectors": ["joy"], "positions": [-1], "sae": "features"}
    plain = (await http.post("/v1/inspect/activations", json=body)).json()
    steered = (await http.post("/v1/inspect/activations", json={**body, "steering": joy})).json()
    before, after = plain["vectors"][0], steered["vectors"][0]
    assert (before["layer"], after["layer"]) == (2, 2)
    assert after["projections"][0] > before["projections"][0] + 1
    assert steered["layers"][1] == plain["layers"][1]
    assert plain["features"]["active"][0] == len(plain["features"]["top"][0])


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("logit-lens", {"text": "a river"}),
        ("patchscope", {"source": {"text": "a river"}, "max_tokens": 0, "target_layers": "all"}),
        ("activations", {"text": "a river", "vectors": ["joy"]}),
    ],
)
async def test_a_heat_map_is_a_png(
    http: httpx.AsyncClient, route: str, body: dict[str, Any]
) -> None:
    asked = await http.post(f"/v1/inspect/{route}?format=png", json=body)
    accepted = await http.post(
        f"/v1/inspect/{route}", json=body, headers={"accept": "image/png,*/*;q=.1"}
    )
    for response in (asked, accepted):
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "image/png"
        assert response.content.startswith(b"\x89PNG\r\n\x1a\n")
    assert asked.content == accepted.content
    insisted = await http.post(
        f"/v1/inspect/{route}?format=json", json=body, headers={"accept": "image/png"}
    )
    assert insisted.json()["object"] == "inspect." + route.replace("-", "_")


@pytest.mark.parametrize(
    ("route", "body", "status", "param", "code"),
    [
        (
            "patchscope?format=png",
            {"source": {"text": "ab"}, "positions": "all", "target_layers": "all"},
            400,
            "/positions",
            "no_heat_map",
        ),
        ("activations?format=png", {"text": "ab"}, 400, "/vectors", "no_heat_map"),
        (
            "patchscope",
            {"source": {"text": "w" * 90}, "positions": "all", "target_layers": "all"},
            413,
            "/positions",
            "answer_too_large",
        ),
        ("logit-lens", {"text": "ab", "top": 0}, 400, "/top", "invalid_value"),
        ("logit-lens", {"text": "ab", "layers": [4]}, 400, "/layers/0", "layer_out_of_range"),
        ("patchscope", {"source": {"text": "ab"}, "preset": "custom"}, 400, None, "invalid_value"),
        (
            "patchscope",
            {"source": {"text": "ab"}, "target": {"text": "abc", "placeholder": "bc"}},
            400,
            "/target/placeholder",
            "not_one_token",
        ),
        ("activations", {"text": "ab", "vectors": ["wide"]}, 400, "/vectors/0", "wrong_width"),
        ("activations", {"text": "w" * 200}, 400, "/text", "context_length_exceeded"),
    ],
)
async def test_bad_requests_say_where(
    http: httpx.AsyncClient,
    route: str,
    body: dict[str, Any],
    status: int,
    param: str | None,
    code: str,
) -> None:
    response = await http.post(f"/v1/inspect/{route}", json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    health = await http.post("/v1/inspect/logit-lens", json={"text": "ab", "top": 1})
    assert health.status_code == 200


async def test_states_beyond_what_json_may_hold_come_as_a_file(http: httpx.AsyncClient) -> None:
    url, body = "/v1/inspect/activations", {"text": "a" * 80, "states": True}
    headers = {"accept": "application/octet-stream"}
    response = await http.post(url, json=body, headers=headers)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/octet-stream"
    assert int(response.headers["content-length"]) == len(response.content)
    found = safetensors.torch.load(response.content)
    json_body = (await http.post(url, json={**body, "positions": [5, 80]})).json()
    for entry in json_body["layers"]:
        rows = found[f"layers.{entry['layer']}"]
        assert rows.shape == (81, 16)
        assert torch.allclose(rows[[5, 80]], torch.tensor(entry["states"]), atol=1e-6)
    wrong = await http.post(url, json={**body, "layers": [77]}, headers=headers)
    assert wrong.status_code == 400
    assert wrong.json()["error"]["param"] == "/layers/0"


ASK = {
    "source": {"text": "the river"},
    "questions": ["Who", "What"],
    "layers": [0, 2],
    "max_tokens": 3,
}


async def test_states_are_asked_by_an_uploaded_oracle(http: httpx.AsyncClient) -> None:
    form = OracleForm(message="{states} {question}", placeholder="?")
    modules = {f"model.layers.{n}.mlp.down_proj": (24, 16) for n in range(LAYERS)}
    oracle = random_oracle(1, modules, LAYERS, form=form)
    sent = await http.post(
        "/v1/steering/oracles", files={"file": ("o", oracle.to_bytes())}, data={"name": "sibyl"}
    )
    assert sent.status_code == 201, sent.text
    listed = (await http.get("/v1/steering/oracles")).json()
    assert [one["name"] for one in listed["data"]] == ["sibyl"]
    found = (await http.post("/v1/inspect/ask", json={**ASK, "oracle": "sibyl"})).json()
    assert (found["oracle"], found["trained"]) == ("sibyl", True)
    plain = {**ASK, "form": form.model_dump()}
    other = (await http.post("/v1/inspect/ask", json=plain)).json()
    assert "oracle" not in other
    assert not other["trained"]
    assert [c["text"] for c in found["cells"]] != [c["text"] for c in other["cells"]]
    for cell in (*found["cells"], *other["cells"]):
        assert set(cell["controls"]) == {"text", "shuffled", "none"}
    drawn = await http.post("/v1/inspect/ask?format=png", json=plain)
    assert drawn.content.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"oracle": "nobody"}, "unknown_oracle", "/oracle"),
        ({"questions": []}, "invalid_value", "/questions"),
        ({"questions": ["x"] * 33}, "invalid_value", "/questions"),
        ({"positions": [-1] * 9}, "invalid_value", "/positions"),
        ({"form": "oracle"}, "invalid_value", "/form"),
        ({"form": {"message": "{states}"}}, "invalid_value", "/form"),
        ({"max_tokens": 0}, "invalid_value", "/max_tokens"),
        ({"questions": ["Is it ?"]}, "ambiguous_placeholder", "/questions/0"),
        ({"source": {"text": "a", "tokens": [1]}}, "invalid_value", "/source"),
    ],
)
async def test_what_cannot_be_asked(
    http: httpx.AsyncClient, change: dict[str, Any], code: str, param: str
) -> None:
    response = await http.post("/v1/inspect/ask", json={**ASK, **change})
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["code"], error["param"][: len(param)]) == (code, param)
