"""Whatever is wrong is one red line with its code, exit code 2, and no traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from steer.cli import app

ROOT = Path(__file__).parents[3]
FRENCH = str(ROOT / "vectors" / "demo" / "data" / "french.jsonl")


def failed(*arguments: str) -> str:
    """The error's text, after checking how it came out."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    assert result.stdout == ""
    return result.stderr


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    contents = {
        "not-json": "{",
        "a-list": "[]",
        "empty": '{"interventions": []}',
        "unknown-field": '{"interventions": [{"kind": "add", "vector": "v", "colour": 1}]}',
        "two-problems": json.dumps(
            {"interventions": [{"kind": "magic"}, {"kind": "add", "vector": "a/b"}]}
        ),
        "nan": '{"interventions": [{"kind": "add", "vector": "v", "strength": NaN}]}',
        "pickle": "\x80\x04K\x01.",
        "pairs": '{"positive": "a"}',
        "deep": "[" * 100_000,
        "two-lines": "secret\nsecret\n",
    }
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "lies.safetensors").write_bytes(b"\xff" * 64)
    return {path.name: str(path) for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("fit", "nowhere.jsonl"), "no_such_file"),
        (("fit", "{pairs}"), "invalid_pairs"),
        (("fit", FRENCH, "--name", "a/b"), "invalid_name"),
        (("generate", "hi", "-v", "french", "--device", "cuda:99"), "invalid_option"),
        (("generate", "hi", "-v", "french", "--device", "abacus"), "invalid_option"),
        (("generate", "hi", "-v", "french", "--device", "meta"), "invalid_option"),
        (("generate", "hi", "-v", "french", "--dtype", "zzz"), "invalid_option"),
        (("generate", "hi", "-v", "french", "--dtype", "int8"), "invalid_option"),
        (("generate", "hi", "--spec", "{deep}"), "invalid_json"),
        (("validate", "{deep}"), "invalid_json"),
        (("serve", "--api-key-file", "{lies.safetensors}"), "invalid_key"),
        (("serve", "--api-key-file", "{two-lines}"), "invalid_key"),
        (("serve", "--engine", "fake", "--host", "0.0.0.0"), "no_key"),
        (("fit", FRENCH, "--layers", "x"), "invalid_option"),
        (("fit", FRENCH, "--layers", "5-2"), "invalid_option"),
        (("fit", FRENCH, "--layers", "0-99999999999"), "layer_out_of_range"),
        (("fit", FRENCH, "--site", "nowhere"), "unsupported_site"),
        (("fit", FRENCH, "--model", "/nowhere"), "model_not_loaded"),
        (("fit", FRENCH, "--out", "/nowhere/v.safetensors"), "not_written"),
        (("generate", "hi"), "exactly one of"),
        (("generate", "hi", "-v", "french", "--profile", "french"), "exactly one of"),
        (("generate", "hi", "--profile", "french", "-x", "2"), "go with --vector"),
        (("generate", "hi", "-v", "nowhere"), "unknown_vector"),
        (("generate", "hi", "-v", "french", "-x", "nan"), "not a finite number"),
        (("generate", "hi", "-v", "french", "--layers", "99"), "layer"),
        (("generate", "hi", "-v", "./nowhere.safetensors"), "no_such_file"),
        (("generate", "hi", "-v", "{lies.safetensors}"), "error:"),
        (("generate", "hi", "--profile", "nowhere"), "unknown_profile"),
        (("generate", "hi", "--spec", "{not-json}"), "invalid_json"),
        (("generate", "hi" * 900, "-v", "french"), "context_length_exceeded"),
        (("sweep", "french", "-p", "{pairs}", "-s", "magic"), "invalid_scorer"),
        (("sweep", "french", "-p", "{pairs}", "-s", "regex:a", "--strengths", "inf"), "strengths"),
        (("sweep", "french", "-p", "nowhere", "-s", "regex:a"), "no_such_file"),
        (("calibrate", "french", "-p", "{pairs}", "-s", "magic"), "invalid_scorer"),
        (("calibrate", "french", "-p", "nowhere"), "no_such_file"),
        (("calibrate", "nowhere", "-p", "nowhere"), "unknown_vector"),
        (("evaluate", "french", "-p", "nowhere", "-s", "probe:nowhere"), "unknown_vector"),
        (("evaluate", "french", "-p", "nowhere", "-s", "judge:nowhere"), "invalid_scorer"),
        (("generate", "hi", "-v", "french", "-x", "much"), "invalid_option"),
        (("vectors", "add", "nowhere.safetensors"), "no_such_file"),
        (("vectors", "add", "{pickle}", "--name", "v"), "error:"),
        (("vectors", "add", "{lies.safetensors}"), "error:"),
        (("vectors", "add", "nowhere.gguf", "--from", "nobody"), "known are"),
        (("vectors", "import", "hf://nobody"), "invalid_reference"),
        (("vectors", "import", "hf://no/body", "--offline"), "hub_unreachable"),
        (("vectors", "import", "nowhere"), "no_such_file"),
        (("vectors", "show", "nowhere"), "unknown_vector"),
        (("vectors", "remove", "../etc"), "unknown_vector"),
        (("vectors", "export", "nowhere"), "unknown_vector"),
        (("vectors", "export", "nowhere", "--format", "npz"), "invalid_option"),
        (("profiles", "add", "{a-list}"), "invalid_spec"),
        (("profiles", "add", "{unknown-field}"), "unknown_field, at /interventions/0/colour"),
        (("profiles", "remove", "nowhere"), "unknown_profile"),
        (("validate", "{not-json}"), "invalid_json"),
        (("validate", "{empty}"), "/interventions"),
        (("validate", "{nan}"), "/interventions/0/strength"),
        (("inspect", "logit-lens", "hi", "--site", "nowhere"), "invalid_option"),
        (("inspect", "logit-lens", "hi", "--at", "99"), "position_out_of_range"),
        (("inspect", "patchscope", "hi", "--preset", "magic"), "invalid_option"),
        (("inspect", "activations", "hi", "--vector", "nowhere"), "unknown_vector"),
        (("serve", "--engine", "magic"), "unknown_engine"),
        (("serve", "--model", "/nowhere"), "model_not_loaded"),
        (("serve", "--api-key-file", "nowhere"), "no_such_file"),
        (("serve", "--registry", "s3://bucket"), "unsupported_location"),
    ],
)
def test_one_red_line(
    arguments: tuple[str, ...],
    says: str,
    files: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    given = [files[a[1:-1]] if a.startswith("{") else a for a in arguments]
    takes_registry = arguments[0] != "fit" and "--registry" not in arguments
    if takes_registry:
        given += ["--registry", str(tmp_path_factory.mktemp("registry"))]
    shown = failed(*given)
    assert says in shown
    assert shown.startswith("error: ")
    assert len(shown.splitlines()) == 1


def test_every_problem_has_its_line(files: dict[str, str]) -> None:
    lines = failed("validate", files["two-problems"], "--syntax-only").splitlines()
    assert len(lines) == 2
    assert "/interventions/0" in lines[0]
    assert "/interventions/1/vector" in lines[1]


def test_parameters_of_a_job_are_an_object(files: dict[str, str]) -> None:
    assert "does not hold the parameters of a job" in failed(
        "jobs", "submit", "fit", files["a-list"]
    )


def test_a_spec_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_bytes(b"\xef\xbb\xbf" + b'{"interventions": []}')
    # What is wrong with it is what it says, and not how it begins.
    assert "a list of at least 1 is needed" in failed("generate", "hi", "--spec", str(spec))
