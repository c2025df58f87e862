"""`steer sae` on the demo model: from two sets of chats to the feature that is known to cause."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from steer.cli import app

FRENCH = Path(__file__).parents[3] / "vectors" / "demo" / "data" / "french.jsonl"
LATENT = 809
"""The demo's SAE card says that this one makes it answer in French."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


def steer(place: Path, *arguments: object, code: int = 0) -> str:
    given = ["sae", *map(str, arguments), "--registry", str(place)]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


def test_a_contrast_finds_what_makes_it_answer_in_french(place: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(FRENCH.read_text().splitlines(keepends=True)[:40]))
    asked = ("contrast", "resid-3", pairs, "--pooled", "last", "--permutations", 199)
    found = json.loads(steer(place, *asked, "--json"))
    assert (found["positive"], found["negative"]) == (40, 40)
    [one] = [one for one in found["features"] if one["feature"] == LATENT]
    assert one["confirmed"]
    assert one["fires_on"] == "positive"
    assert "French" in one["label"]["text"]
    sides = {name: tmp_path / name for name in ("positive", "negative")}
    for name, file in sides.items():
        rows = [json.loads(line)[name] for line in pairs.read_text().splitlines()]
        file.write_text("\n".join(map(json.dumps, rows)))
    two = ("contrast", "resid-3", *sides.values(), "--pooled", "last", "--permutations", 199)
    assert json.loads(steer(place, *two, "--json")) == found


def test_a_feature_before_and_after_a_survey(place: Path, tmp_path: Path) -> None:
    assert "not surveyed" in steer(place, "show", "resid-3", LATENT)
    texts = tmp_path / "texts.jsonl"
    texts.write_text('"Is Rome nice?"\n"Rome is in Italy."\n')
    assert "2 texts" in steer(place, "survey", "resid-3", texts)
    active = json.loads(
        steer(place, "tokens", "resid-3", "Is Rome nice?", "--at", "Rome", "--json")
    )
    (best, *_), *_ = active["features"]["top"]
    shown = json.loads(steer(place, "show", "resid-3", best["feature"], "--json"))["statistics"]
    assert shown["largest"] >= best["activation"] * 0.999
    assert any("Rome" in "".join(example["tokens"]) for example in shown["top"])
    assert "fires on" in steer(place, "show", "resid-3", best["feature"])


def test_what_makes_it_answer_in_french_promotes_french(place: Path) -> None:
    asked = ("effect", "resid-3", LATENT, "--nulls", 10, "--max-tokens", 12)
    [found] = json.loads(steer(place, *asked, "--json"))
    assert found["written"]["change"] > found["written"]["strongest"]
    assert {" la", " le", " Le", "La", "Le"} & {one["token"] for one in found["promoted"]}
    assert found["verdict"] in ("writes", "causes")
    assert "raised by" in steer(place, "show", "resid-3", LATENT)


def test_a_feature_that_is_not_there(place: Path) -> None:
    assert "unknown_feature" in steer(place, "show", "resid-3", 9999, code=2)
