"""Uploads, and what can then be done with the artefacts."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load, save
from torch import full, ones, randn, stack, zeros
from torch import save as torch_save

from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.formats.options import ImportOptions
from steer.formats.vectors.gguf import read_gguf

URL = "/v1/steering/vectors"
LENS = {"weight": (4, 4), "bias": (4,)}


async def send(
    http: httpx.AsyncClient, content: bytes, filename: str = "mine.safetensors", **fields: str
) -> httpx.Response:
    return await http.post(URL, files={"file": (filename, content)}, data=fields)


@pytest.fixture
def leftovers(tmp_path: Path) -> Callable[[], list[Path]]:
    """Lists temporary files of the registry that are still there."""

    def found() -> list[Path]:
        files = (tmp_path / "registry" / "staging").rglob("*")
        return [file for file in files if file.is_file() and file.name != "owner.lock"]

    return found


async def test_an_upload_is_described_and_the_same_again_is_not_new(
    http: httpx.AsyncClient,
) -> None:
    content = save({"layers.2": ones(16), "layers.3": ones(16)})
    first = await send(http, content, strength="0.5", layers="3", description="All ones")
    assert first.status_code == 201
    body = first.json()
    assert (body["name"], body["version"], body["d_model"], body["layers"]) == (
        "mine",
        1,
        16,
        [2, 3],
    )
    assert body["id"] == f"mine@{body['sha256'][:12]}"
    assert body["card"]["default_strength"] == 0.5
    assert body["card"]["default_layers"] == [3]
    again = await send(http, content, strength="0.5", layers="[3]", description="All ones")
    assert again.status_code == 200
    assert again.json()["id"] == body["id"]
    changed = await send(http, save({"layers.2": 2 * ones(16)}))
    assert changed.status_code == 201
    assert changed.json()["version"] == 2


async def test_the_uploaded_content_can_be_downloaded(http: httpx.AsyncClient) -> None:
    body = (await send(http, save({"layers.2": ones(16)}), filename="x.safetensors")).json()
    content = await http.get(f"{URL}/x/content")
    assert hashlib.sha256(content.content).hexdigest() == body["sha256"]
    assert content.headers["content-length"] == str(body["size_bytes"])
    back = await send(http, content.content, filename="x.safetensors")
    assert (back.status_code, back.json()["id"]) == (200, body["id"])


async def test_artefacts_are_listed_shown_and_deleted(http: httpx.AsyncClient) -> None:
    names = [row["name"] for row in (await http.get(URL)).json()["data"]]
    assert names == ["calm", "deep", "joy", "wide"]
    page = (await http.get(URL, params={"limit": 2, "offset": 1})).json()
    assert [row["name"] for row in page["data"]] == ["deep", "joy"]
    assert page["has_more"] is True
    assert [r["name"] for r in (await http.get(URL, params={"q": "al"})).json()["data"]] == ["calm"]
    shown = (await http.get(f"{URL}/calm")).json()
    assert (await http.get(f"{URL}/{shown['id']}")).json() == shown
    assert shown["versions"] == [shown["id"]]
    deleted = await http.delete(f"{URL}/calm")
    assert deleted.json() == {"id": shown["id"], "name": "calm", "deleted": True}
    assert (await http.get(f"{URL}/calm")).status_code == 404
    assert (await http.delete(f"{URL}/calm")).status_code == 404


async def test_an_artefact_that_a_profile_needs_stays(
    http: httpx.AsyncClient, joy: dict[str, Any]
) -> None:
    await http.post("/v1/steering/profiles", json={"name": "p", "spec": joy})
    refused = await http.delete(f"{URL}/joy")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "in_use")
    await http.delete("/v1/steering/profiles/p")
    assert (await http.delete(f"{URL}/joy")).status_code == 200


async def test_an_sae_comes_as_an_archive_or_file_by_file(http: httpx.AsyncClient) -> None:
    config = {
        "architecture": "standard",
        "d_in": 16,
        "d_sae": 4,
        "hook_name": "blocks.2.hook_resid_post",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "dtype": "float32",
        "device": "cpu",
        "metadata": {"hook_name": "blocks.2.hook_resid_post"},
    }
    weights = {
        "W_enc": randn(16, 4),
        "b_enc": zeros(4),
        "W_dec": randn(4, 16),
        "b_dec": zeros(16),
    }
    files = {"cfg.json": json.dumps(config).encode(), "sae_weights.safetensors": save(weights)}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    one = await http.post("/v1/steering/saes", files={"file": ("mine.zip", packed.getvalue())})
    assert one.status_code == 201, one.text
    many = await http.post(
        "/v1/steering/saes",
        files=[("file", (name, content)) for name, content in files.items()],
        data={"name": "mine"},
    )
    assert many.status_code == 200, many.text
    assert many.json()["id"] == one.json()["id"]
    spec = {"interventions": [{"kind": "clamp", "sae": "mine", "features": [1], "value": 3}]}
    checked = await http.post("/v1/steering/validate", json={"steering": spec})
    assert checked.json()["valid"], checked.text


BAD: list[tuple[bytes, dict[str, str], str | None]] = [
    (b"", {}, None),
    (b"nonsense", {}, None),
    (b"GGUF" + b"\xff" * 40, {}, None),
    (save({"layers.2": ones(16)})[:-8], {}, None),
    ((2**62).to_bytes(8, "little") + b"{}", {}, None),
    (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins", {}, None),
    (save({"layers.2": full((16,), float("nan"))}), {}, None),
    (save({"layers.2": zeros(16)}), {}, None),
    (save({"layers.2": ones(16), "layers.3": ones(17)}), {}, None),
    (save({"layers.2": ones(16)}), {"name": "a/b"}, "/name"),
    (save({"layers.2": ones(16)}), {"name": "../up"}, "/name"),
    (save({"layers.2": ones(16)}), {"strength": "inf"}, "/strength"),
    (save({"layers.2": ones(16)}), {"strength": "much"}, "/strength"),
    (save({"layers.2": ones(16)}), {"layers": "all"}, "/layers"),
    (save({"layers.2": ones(16)}), {"layers": "7"}, "/layers"),
    (save({"layers.2": ones(16)}), {"layer_offset": "1.5"}, "/layer_offset"),
    (save({"layers.2": ones(16)}), {"colour": "red"}, "/colour"),
]


@pytest.mark.parametrize(("content", "fields", "param"), BAD)
async def test_what_cannot_be_used_is_refused_and_leaves_nothing(
    http: httpx.AsyncClient,
    leftovers: Callable[[], list[Path]],
    content: bytes,
    fields: dict[str, str],
    param: str | None,
) -> None:
    response = await send(http, content, **fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == (param or "/file")
    assert (await http.get(f"{URL}/mine")).status_code == 404
    assert leftovers() == []


async def test_an_archive_that_climbs_is_refused(http: httpx.AsyncClient, tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("../../cfg.json", "{}")
    response = await http.post("/v1/steering/saes", files={"file": ("x.zip", packed.getvalue())})
    assert response.status_code == 400
    assert not list(tmp_path.rglob("cfg.json"))


async def test_a_vector_is_no_sae(http: httpx.AsyncClient) -> None:
    content = save({"layers.2": ones(16)})
    response = await http.post("/v1/steering/saes", files={"file": ("x.safetensors", content)})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "wrong_kind")


async def test_an_upload_over_the_limit_is_stopped(
    http: httpx.AsyncClient, leftovers: Callable[[], list[Path]]
) -> None:
    response = await send(http, b"x" * 300_000)
    assert response.status_code == 413, response.text
    assert response.json()["error"]["code"] == "upload_too_large"
    response = await send(http, b"x" * 3_000_000)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert leftovers() == []


async def test_an_upload_without_a_length_is_stopped_on_the_way(
    http: httpx.AsyncClient, leftovers: Callable[[], list[Path]]
) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\n'
        for _ in range(1000):
            sent += 10_000
            yield b"x" * 10_000

    headers = {"content-type": "multipart/form-data; boundary=b"}
    response = await http.post(URL, content=endless(), headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "upload_too_large")
    assert sent < 300_000
    assert leftovers() == []


HEAD = b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\n'


@pytest.mark.parametrize(
    ("kind", "content", "status"),
    [
        ("application/json", b"{}", 415),
        ("multipart/form-data", HEAD, 400),
        ("multipart/form-data; boundary=b", b"", 400),
        ("multipart/form-data; boundary=b", b"no boundary here", 400),
        ("multipart/form-data; boundary=b", HEAD + b"cut off", 400),
        ("multipart/form-data; boundary=b", b"--b\r\n: \r\n\r\nx\r\n--b--\r\n", 400),
        ("multipart/form-data; boundary=b", b"--b--\r\n", 400),
    ],
)
async def test_bodies_that_are_no_upload(
    http: httpx.AsyncClient,
    leftovers: Callable[[], list[Path]],
    kind: str,
    content: bytes,
    status: int,
) -> None:
    response = await http.post(URL, content=content, headers={"content-type": kind})
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]
    assert leftovers() == []


@pytest.mark.parametrize("name", ["../x", "/x", "", "cfg.json", "a/b"])
async def test_files_of_a_folder_have_plain_different_names(
    http: httpx.AsyncClient, name: str
) -> None:
    files = [("file", ("cfg.json", b"{}")), ("file", (name or "..", b"{}"))]
    response = await http.post("/v1/steering/saes", files=files)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_filename")


async def test_too_many_parts_are_refused(http: httpx.AsyncClient) -> None:
    files = [("file", (f"f{n}", b"x")) for n in range(9)]
    assert (await http.post(URL, files=files)).status_code == 400
    fields = {f"field{n}": "x" for n in range(40)}
    assert (await http.post(URL, files={"file": b"x"}, data=fields)).status_code == 400
    long = {"description": "x" * 70_000}
    assert (await http.post(URL, files={"file": b"x"}, data=long)).status_code == 413


async def test_rows_are_numbered_as_the_sender_says(http: httpx.AsyncClient) -> None:
    stream = io.BytesIO()
    torch_save(stack([full((16,), float(n + 1)) for n in range(5)]), stream)
    content = stream.getvalue()
    refused = await send(http, content)
    assert refused.json()["error"]["code"] == "layer_offset_required"
    fields = {"from": "persona-vectors"}
    answer = await send(http, content, **fields)
    assert answer.status_code == 201, answer.text
    card = answer.json()["card"]
    assert card["layers"] == [0, 1, 2, 3]
    assert card["provenance"]["layer_names"]["0"] == "tensor[1]"
    assert card["provenance"]["file_sha256"] == hashlib.sha256(content).hexdigest()
    wrong = await send(http, content, **{"from": "nobody"})
    assert wrong.json()["error"]["param"] == "/from"


async def test_a_single_row_is_placed_on_the_side_that_the_sender_says(
    http: httpx.AsyncClient,
) -> None:
    """direction.pt of refusal_direction counts inputs: a layer alone is not enough."""
    stream = io.BytesIO()
    torch_save(ones(16), stream)
    content = stream.getvalue()
    asked = await send(http, content)
    assert asked.json()["error"]["code"] == "layer_required"
    again = await send(http, content, layers="3")
    assert again.status_code == 400
    assert (again.json()["error"]["code"], again.json()["error"]["param"]) == (
        "site_required",
        "/site",
    )
    for said, site in (
        ({"from": "refusal-direction"}, "resid_pre"),
        ({"from": "blocks"}, "resid_post"),
        ({"site": "mlp_out"}, "mlp_out"),
    ):
        answer = await send(http, content, layers="3", **said)
        assert answer.status_code == 201, answer.text
        assert (answer.json()["layers"], answer.json()["card"]["site"]) == ([3], site)
    wrong = await send(http, content, layers="3", site="nowhere")
    assert wrong.json()["error"]["param"] == "/site"


async def test_a_vector_can_be_had_as_gguf(http: httpx.AsyncClient, tmp_path: Path) -> None:
    content = save({"layers.2": ones(16), "layers.3": 2 * ones(16)})
    uploaded = (await send(http, content, strength="0.5")).json()
    answer = await http.get(f"{URL}/mine/content?format=gguf")
    assert answer.status_code == 200
    assert answer.headers["content-disposition"] == 'attachment; filename="mine.gguf"'
    assert "strength 0.5" in answer.headers["steer-warning"]
    assert answer.content.startswith(b"GGUF")
    back = await send(http, answer.content, filename="back.gguf")
    assert back.json()["sha256"] == uploaded["sha256"]
    plain = await http.get(f"{URL}/mine/content?format=safetensors-plain")
    assert sorted(load(plain.content)) == ["layers.2", "layers.3"]
    assert (await http.get(f"{URL}/mine/content?format=pickle")).status_code == 400
    sae = await http.get("/v1/steering/saes/features/content?format=gguf")
    assert sae.json()["error"]["code"] == "unsupported_format"


async def test_some_layers_alone_can_be_had(http: httpx.AsyncClient, tmp_path: Path) -> None:
    data = ControlVector.of({n: full((16,), n + 1.0) for n in range(3)}).to_bytes()
    await send(http, data)
    answer = await http.get(f"{URL}/mine/content?format=gguf&layers=2,1")
    path = tmp_path / "mine.gguf"
    path.write_bytes(answer.content)
    assert list(read_gguf(path, ImportOptions()).directions) == [1, 2]
    own = await http.get(f"{URL}/mine/content?layers=2")
    assert list(ControlVector.from_bytes(own.content).directions) == [2]
    missing = await http.get(f"{URL}/mine/content?layers=7")
    assert (missing.status_code, missing.json()["error"]["param"]) == (400, "/layers")
    wrong = await http.get(f"{URL}/mine/content?layers=a")
    assert wrong.status_code == 400
    span = await http.get(f"{URL}/mine/content?format=gguf&layers=1-2")
    path.write_bytes(span.content)
    assert list(read_gguf(path, ImportOptions()).directions) == [1, 2]


@pytest.mark.parametrize(
    ("layers", "code"),
    [
        ("x", "invalid_option"),
        ("3-1", "invalid_option"),
        ("-1", "invalid_option"),
        ("", "invalid_option"),
        ("1,1", "invalid_option"),
        ("0-2,1", "invalid_option"),
        ("0-999999999999", "layer_out_of_range"),
        ("9" * 6000, "layer_out_of_range"),
        ("0-1023", "layer_not_in_vector"),
        ("7", "layer_not_in_vector"),
    ],
)
@pytest.mark.parametrize("format", ["safetensors", "gguf"])
async def test_layers_that_make_no_sense_are_refused_by_field(
    http: httpx.AsyncClient, layers: str, code: str, format: str
) -> None:
    await send(http, ControlVector.of({n: full((16,), n + 1.0) for n in range(3)}).to_bytes())
    answer = await http.get(f"{URL}/mine/content", params={"format": format, "layers": layers})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("/layers", code)


@pytest.mark.parametrize(
    ("layers", "param"),
    [("1-2", None), ("[1, 2]", None), ("2,1", None), ("2-1", "/layers"), ("[1", "/layers")],
)
async def test_layers_in_a_form_are_written_in_the_same_way(
    http: httpx.AsyncClient, layers: str, param: str | None
) -> None:
    data = ControlVector.of({n: full((16,), n + 1.0) for n in range(3)}).to_bytes()
    answer = await send(http, data, layers=layers)
    if param is None:
        assert answer.json()["card"]["default_layers"] == [1, 2], answer.text
    else:
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("field", ["layer_offset", "position"])
@pytest.mark.parametrize("value", ["99999999999999999999", "-" + "9" * 30, "9" * 5000])
async def test_numbers_beyond_all_measure_are_refused_by_field(
    http: httpx.AsyncClient, field: str, value: str
) -> None:
    answer = await send(http, save({"layers.2": ones(16)}), **{field: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, f"/{field}"), answer.text


async def test_what_gguf_cannot_hold_is_refused(http: httpx.AsyncClient) -> None:
    await send(http, save({"layers.0": ones(16)}))
    answer = await http.get(f"{URL}/mine/content?format=gguf")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "layer_not_exportable")
    assert "safetensors" in answer.json()["error"]["message"]
    await send(http, save({f"layers.{n}": ones(16) for n in range(3)}), filename="more")
    for query in ("format=gguf", "format=gguf&layers=0-1"):
        whole = await http.get(f"{URL}/more/content?{query}")
        assert whole.status_code == 400, query
        error = whole.json()["error"]
        assert (error["code"], error["param"]) == ("layer_not_exportable", "/layers")
    named = "layers=1,2"
    told = (await http.get(f"{URL}/more/content?format=gguf")).json()["error"]["message"]
    assert named in told
    assert (await http.get(f"{URL}/more/content?format=gguf&{named}")).status_code == 200


def sae_files(width: int, layer: int, model: str | None = None) -> list[tuple[str, Any]]:
    config = {
        "architecture": "standard",
        "d_in": width,
        "d_sae": 4,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "dtype": "float32",
        "metadata": {"hook_name": f"blocks.{layer}.hook_resid_post", "model_name": model},
    }
    weights = {
        "W_enc": randn(width, 4),
        "b_enc": zeros(4),
        "W_dec": randn(4, width),
        "b_dec": zeros(width),
    }
    return [
        ("file", ("cfg.json", json.dumps(config).encode())),
        ("file", ("sae_weights.safetensors", save(weights))),
    ]


def lens_files(width: int, layers: int) -> list[tuple[str, Any]]:
    stream = io.BytesIO()
    state = {f"{n}.weight": ones(width, width) for n in range(layers)}
    torch_save(state | {f"{n}.bias": ones(width) for n in range(layers)}, stream)
    config = {"d_model": width, "num_hidden_layers": layers}
    return [
        ("file", ("config.json", json.dumps(config).encode())),
        ("file", ("params.pt", stream.getvalue())),
    ]


def vector_file(width: int, *layers: int, **card: Any) -> list[tuple[str, Any]]:
    vector = ControlVector.of({layer: ones(width) for layer in layers}, **card)
    return [("file", ("v.safetensors", vector.to_bytes()))]


def adapter_file(width: int, layer: int) -> list[tuple[str, Any]]:
    part = (randn(2, width), randn(2, width), randn(2))
    return [("file", ("a.safetensors", LowRankAdapter.of({layer: part}).to_bytes()))]


MISFITS = [
    ("vectors", vector_file(17, 2), "wrong_width", ("17", "16")),
    ("vectors", vector_file(16, 6), "layer_out_of_range", ("6", "0 to 5")),
    ("vectors", vector_file(16, 2, 99), "layer_out_of_range", ("99", "0 to 5")),
    ("adapters", adapter_file(17, 2), "wrong_width", ("17", "16")),
    ("adapters", adapter_file(16, 6), "layer_out_of_range", ("6", "0 to 5")),
    ("saes", sae_files(17, 2), "wrong_width", ("17", "16")),
    ("saes", sae_files(16, 6), "layer_out_of_range", ("6", "0 to 5")),
    ("lenses", lens_files(17, 6), "wrong_width", ("17", "16")),
    ("lenses", lens_files(16, 7), "layer_out_of_range", ("6", "0 to 5")),
    ("lenses", lens_files(16, 5), "layer_out_of_range", ("0 to 4", "0 to 5")),
]


@pytest.mark.parametrize(("folder", "files", "code", "numbers"), MISFITS)
async def test_what_cannot_fit_the_served_model_is_refused(
    http: httpx.AsyncClient,
    leftovers: Callable[[], list[Path]],
    folder: str,
    files: list[tuple[str, Any]],
    code: str,
    numbers: tuple[str, ...],
) -> None:
    url = f"/v1/steering/{folder}"
    for fields in ({}, {"model": "fake-model"}, {"model": "org/fake-model"}, {"model": ""}):
        refused = await http.post(url, files=files, data={"name": "mine", **fields})
        assert refused.status_code == 400, refused.text
        error = refused.json()["error"]
        assert (error["code"], error["param"]) == (code, "/file")
        assert all(number in error["message"] for number in (*numbers, "fake-model"))
        assert (await http.get(f"{url}/mine")).status_code == 404
        assert leftovers() == []
    other = await http.post(url, files=files, data={"name": "mine", "model": "another"})
    assert other.status_code == 201, other.text
    assert other.json()["model"] == "another"
    listed = (await http.get(url, params={"model": "another"})).json()["data"]
    assert [row["name"] for row in listed] == ["mine"]


@pytest.mark.parametrize(
    ("folder", "files"),
    [
        ("vectors", vector_file(16, 0, 5)),
        ("adapters", adapter_file(16, 5)),
        ("saes", sae_files(16, 5)),
        ("lenses", lens_files(16, 6)),
    ],
)
async def test_what_fits_the_served_model_is_taken(
    http: httpx.AsyncClient, folder: str, files: list[tuple[str, Any]]
) -> None:
    answer = await http.post(f"/v1/steering/{folder}", files=files, data={"name": "mine"})
    assert answer.status_code == 201, answer.text


async def test_a_file_whose_own_card_names_another_model_is_for_that_one(
    http: httpx.AsyncClient,
) -> None:
    files = vector_file(17, 99, model="/models/another")
    taken = await http.post(URL, files=files)
    assert taken.status_code == 201, taken.text
    assert taken.json()["model"] == "another"  # no path, though the file has one
    assert taken.json()["card"]["model"] == "another"
    spec = {"interventions": [{"kind": "add", "vector": "v"}]}
    used = (await http.post("/v1/steering/validate", json={"steering": spec})).json()
    assert used["valid"] is False
    # What the form says goes before what the card says.
    ours = await http.post(URL, files=files, data={"model": "fake-model"})
    assert ours.json()["error"]["code"] == "wrong_width"
    sae = await http.post(
        "/v1/steering/saes", files=sae_files(17, 40, "gpt2-small"), data={"name": "theirs"}
    )
    assert (sae.status_code, sae.json()["model"]) == (201, "gpt2-small"), sae.text


async def test_a_tuned_lens_comes_as_its_two_files(http: httpx.AsyncClient) -> None:
    stream = io.BytesIO()
    state = {f"{n}.{part}": ones(*shape) for n in range(2) for part, shape in LENS.items()}
    torch_save(state, stream)
    answer = await http.post(
        "/v1/steering/lenses",
        files=[
            ("file", ("config.json", b'{"d_model": 4, "num_hidden_layers": 2}')),
            ("file", ("params.pt", stream.getvalue())),
        ],
        data={"name": "tuned", "model": "a-smaller-one"},
    )
    assert answer.status_code == 201, answer.text
    assert answer.json()["card"]["kind"] == "lens"
    theirs = await http.get("/v1/steering/lenses", params={"model": "a-smaller-one"})
    assert [one["name"] for one in theirs.json()["data"]] == ["tuned"]
    assert (await http.get("/v1/steering/lenses")).json()["data"] == []
    wrong = await http.post(URL, files={"file": ("x", stream.getvalue())})
    assert wrong.json()["error"]["code"] == "unknown_layout"
