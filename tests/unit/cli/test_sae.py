"""`steer sae` on the demo model: from two sets of chats to the feature that is known to cause."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from artefacts import random_sae
from stub_model import stub_model
from typer.testing import CliRunner

from steer.cli import app
from steer.registry.registry import Registry

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
    assert found["written"]["q"] == found["written"]["p"]  # of one feature alone
    shown = steer(place, "show", "resid-3", LATENT)
    assert "raised by" in shown
    assert f"q = {found['written']['q']:.2g}" in shown


def test_labels_are_brought_along_made_and_removed(place: Path, tmp_path: Path) -> None:
    brought = tmp_path / "labels.json"
    brought.write_text('{"809": "it says it in French", "3": "numerals"}')
    assert "2 labels" in steer(place, "labels", "import", "resid-3", brought, "--source", "mine")
    assert "numerals" in steer(place, "search", "resid-3", "numerals")
    shown = json.loads(steer(place, "show", "resid-3", LATENT, "--json"))
    assert [one.get("source") for one in shown["labels"][:2]] == ["mine", None]
    assert shown["label"]["text"] == "it says it in French"
    assert shown["label"]["effect"] == shown["labels"][1]["effect"]  # what was measured stays
    texts = tmp_path / "texts.jsonl"
    texts.write_text('"Is Rome nice?"\n"Rome is in Italy."\n')
    steer(place, "survey", "resid-3", texts)
    steer(place, "labels", "make", "resid-3")
    with stub_model() as model:
        model.reply = lambda question: "places in Europe"
        active = json.loads(
            steer(place, "tokens", "resid-3", "Is Rome nice?", "--at", "Rome", "--json")
        )
        (best, *_), *_ = active["features"]["top"]
        steer(place, "labels", "make", "resid-3", best["feature"], "--labeller", model.place)
    labels = json.loads(steer(place, "show", "resid-3", best["feature"], "--json"))["labels"]
    assert [one["text"] for one in labels if one.get("source") == "labeller"] == [
        "places in Europe"
    ]
    assert labels[-1]["source"] == "exemplars"
    listed = steer(place, "labels", "list", "resid-3")
    for source in ("mine", "exemplars", "labeller"):
        assert source in listed
        steer(place, "labels", "remove", "resid-3", source)
    assert json.loads(steer(place, "labels", "list", "resid-3", "--json")) == []
    assert "unknown_labels" in steer(place, "labels", "remove", "resid-3", "mine", code=2)


def test_a_scored_label_says_how_far_it_is_right(place: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    lines = ["Is Rome nice?", "I love Rome.", "Why?", "Tell me how to cook rice.", "A short day."]
    texts.write_text("\n".join(map(json.dumps, lines)))
    steer(place, "survey", "resid-3", texts)
    found = json.loads(steer(place, "tokens", "resid-3", lines[0], "--at", "Rome", "--json"))
    feature = found["features"]["top"][0][0]["feature"]
    steer(place, "labels", "make", "resid-3", feature, "--source", "seen")
    few = ("--nulls", 0, "--max-tokens", 2)
    with stub_model() as model:
        model.reply = lambda question: "1, 2"
        steer(place, "score", "resid-3", feature, *few, "--labeller", model.place)
        assert model.asked
    scored = json.loads(steer(place, "show", "resid-3", feature, "--json"))
    assert scored["scores"]["detection"]["asked"] > 0
    assert scored["label"]["confidence"]["precision"] == scored["scores"]["detection"]["precision"]
    assert "changes log p of" in steer(place, "show", "resid-3", feature)


def test_how_purely_a_feature_stands_for_french(place: Path, tmp_path: Path) -> None:
    data = tmp_path / "labelled.jsonl"
    pairs = [json.loads(line) for line in FRENCH.read_text().splitlines()[:20]]
    data.write_text(
        "".join(
            json.dumps({"messages": pair[side], "label": label}) + "\n"
            for pair in pairs
            for side, label in (("positive", "french"), ("negative", "plain"))
        )
    )
    found = json.loads(steer(place, "trust", "resid-3", "--data", data, "--json"))
    french = next(one for one in found if one["concept"] == "french")
    assert french["capacity"] == 1.0
    assert french["runners_up"]  # the demo model has several features for it
    shown = steer(place, "show", "resid-3", french["feature"])
    assert "from other texts" in shown


def test_what_makes_it_answer_in_french_is_suggested(place: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    pairs = [json.loads(line) for line in FRENCH.read_text().splitlines()[40:64]]
    questions.write_text("".join(json.dumps(pair["negative"]) + "\n" for pair in pairs))
    asked = ("suggest", "Answer in French.", "resid-3", "--opposite", "Answer in English.")
    few = ("--place", "system", "--prompts", questions, "--nulls", 3, "--max-tokens", 12)
    found = json.loads(steer(place, *asked, *few, "--json"))
    best = found["features"][0]
    assert LATENT in [one["feature"] for one in found["features"]]
    assert best["gain"] > max(0.0, best["null"])
    assert found["told"] > best["gain"]
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(best["spec"]))
    checked = ["validate", str(spec), "--registry", str(place)]
    assert CliRunner().invoke(app, checked).exit_code == 0


def test_a_family_before_and_after_a_survey(tmp_path: Path) -> None:
    place = tmp_path / "registry"
    assert "no_survey" in steer(place, "family", "resid-3", LATENT, code=2)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(_chats(40)))
    steer(place, "survey", "resid-3", texts)
    cards = [json.loads(steer(place, "family", "resid-3", n, "--json")) for n in (599, LATENT)]
    for one in cards:
        for family in one["families"]:
            assert one["feature"] in (family["head"], *family["members"])
    shown = steer(place, "family", "resid-3", LATENT)
    assert ("interventions" in shown) == bool(cards[1]["families"])


def _chats(count: int) -> list[str]:
    """The chats of that many pairs, a line each."""
    pairs = [json.loads(line) for line in FRENCH.read_text().splitlines()[:count]]
    return [json.dumps(pair[side]) + "\n" for pair in pairs for side in ("positive", "negative")]


def test_labels_of_another_sae_are_refused(place: Path, tmp_path: Path) -> None:
    brought = tmp_path / "batch-0.jsonl"
    row = {"modelId": "m", "layer": "20-res-16k", "index": "1", "description": "cats"}
    brought.write_text(json.dumps(row))
    assert "wrong_labels" in steer(place, "labels", "import", "resid-3", brought, code=2)


def test_a_feature_becomes_a_detector(tmp_path: Path) -> None:
    with Registry.open(tmp_path) as registry:
        registry.add("jump", random_sae("jumprelu", width=192, layer=3))
    made = ("detector", "jump", 7, "--threshold", 4, "--detects", "an owl", "-n", "owl")
    assert "registered owl@" in steer(tmp_path, *made)
    assert "already registered" in steer(tmp_path, *made)
    with Registry.open(tmp_path) as registry:
        found = registry.detector("owl")
    assert (found.threshold, found.detection.detects) == (4.0, "an owl")
    refused = steer(tmp_path, "detector", "resid-3", LATENT, code=2)
    assert "unsupported_architecture" in refused
    assert "feature_out_of_range" in steer(tmp_path, "detector", "jump", 64, code=2)


def test_a_feature_that_is_not_there(place: Path) -> None:
    assert "unknown_feature" in steer(place, "show", "resid-3", 9999, code=2)
