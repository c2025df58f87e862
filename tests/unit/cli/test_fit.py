"""`steer fit`: a command per kind of data, on the demo model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from steer.artefacts.control_vector import ControlVector
from steer.cli import app
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import EngineError
from steer.fit.methods import bookmark

DATA = Path(__file__).parents[3] / "vectors" / "demo" / "data"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


def steer(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def test_fit_labels_writes_a_vector_each(tmp_path: Path) -> None:
    data = tmp_path / "styles.jsonl"
    lines = [json.loads(line) for line in (DATA / "french.jsonl").read_text("utf-8").splitlines()]
    rows = [
        {"messages": line[side], "label": label}
        for line in lines[:24]
        for side, label in (("positive", "french"), ("negative", "plain"))
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    shown = steer("fit", "labels", data, "--out", tmp_path, "--layers", "1-2", "-n", "style").output
    for label in ("french", "plain"):
        vector = ControlVector.from_bytes((tmp_path / f"style-{label}.safetensors").read_bytes())
        assert vector.card.layers == (1, 2)
        assert f"style-{label}: separation" in shown


def test_fit_refines_by_a_registered_sae_and_compares(registry: Path, tmp_path: Path) -> None:
    file = tmp_path / "refined.safetensors"
    options = ["--refine", "resid-3", "--beside", "--registry", registry, "--out", file]
    steer("fit", "pairs", DATA / "french.jsonl", "--method", "pca", *options)
    vector = ControlVector.from_bytes(file.read_bytes())
    provenance = vector.card.provenance
    assert vector.card.layers == (3,)
    assert provenance["refined_by"]["sae"] == "resid-3"  # type: ignore[index,call-overload]
    assert provenance["cosines"]["french"]["3"] > 0.7  # type: ignore[index,call-overload]


def test_fit_between_two_prompts(tmp_path: Path) -> None:
    file = tmp_path / "toward.safetensors"
    steer(
        *("fit", "prompts", "toward", "--toward", "Answer in French. Where is Kenya?"),
        *("--away", '[{"role": "user", "content": "Where is Kenya?"}]', "--out", file),
    )
    assert ControlVector.from_bytes(file.read_bytes()).card.provenance["method"] == "two_prompts"


def test_fit_relational_concepts(tmp_path: Path) -> None:
    data = tmp_path / "countries.jsonl"
    facts = {"France": "Europe", "Italy": "Europe", "Kenya": "Africa", "Ghana": "Africa"}
    data.write_text(
        "".join(
            json.dumps({"subject": s, "relation": "continent", "object": o}) + "\n"
            for s, o in facts.items()
        )
    )
    shown = steer(
        *("fit", "lrc", data, "--relation", "continent", "--prompt", "Where is {subject}?"),
        *("--opening", "It is in", "--subject-layer", 0, "--site", "resid_pre", "--rank", 16),
        *("--jacobians", 2, "--out", tmp_path, "--name", "in"),
    ).output
    assert "2 concepts from 4 of 4 facts" in shown
    assert (tmp_path / "in-Africa.safetensors").is_file()
    assert (tmp_path / "in-Europe.safetensors").is_file()


def test_fit_trains_an_adapter_into_the_registry(registry: Path, tmp_path: Path) -> None:
    data = tmp_path / "say.jsonl"
    asks = ("Where is Kenya?", "Where is Japan?", "What does the fox eat?", "Where is Peru?")
    rows = [
        {"prompt": [{"role": "user", "content": text}], "answer": "Sorry, no."} for text in asks
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = steer(
        *("fit", "low-rank", data, "--layers", "2-3", "--steps", 25, "--rate", 0.03, "--where"),
        *("all", "--register", "--registry", registry, "--name", "no"),
    ).output
    assert "registered: no@" in shown
    first, last = (float(x) for x in re.findall(r"(\d+\.\d+)", shown.split("token")[0])[:2])
    assert last < first


def test_fit_finds_a_dictionary(tmp_path: Path) -> None:
    data = tmp_path / "asks.jsonl"
    names = ("Kenya", "Japan", "Peru", "Chile", "Ghana", "Cuba")
    data.write_text("".join(json.dumps(f"Where is {name}?") + "\n" for name in names))
    shown = steer(
        *("fit", "snmf", data, "--layer", 2, "--components", 3, "--iterations", 5),
        *("--out", tmp_path / "found", "--name", "group"),
    ).output
    assert "squared length explained" in shown
    assert len(list((tmp_path / "found").glob("group-*.safetensors"))) == 3
    states = steer("fit", "nmf", data, "--layer", 2, "--components", 2, "--out", tmp_path).output
    assert "asks-1.safetensors" in states.replace("\n", "")


def test_fit_moves_a_vector(tmp_path: Path) -> None:
    """From the demo model to itself: nothing changes."""
    prompts = DATA / "heldout.jsonl"
    few = tmp_path / "few.jsonl"
    few.write_text("".join(prompts.read_text("utf-8").splitlines(keepends=True)[:300]))
    source, file = DATA.parent / "vectors" / "french.safetensors", tmp_path / "moved.safetensors"
    shown = steer(
        *("fit", "transfer", source, "--prompts", few, "--from", "steer-demo", "--out", file)
    ).output
    assert "on other prompts" in shown
    moved, original = (ControlVector.from_bytes(p.read_bytes()) for p in (file, source))
    assert moved.cosine(original)[1] > 0.95


def test_fit_names_what_is_wrong(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"positive": "a", "negative": "b"}\n{"positive": "a"}\n')
    failed = steer("fit", data, code=2)
    assert "line 2" in failed.output
    assert "no position" in steer("fit", DATA / "french.jsonl", "--positions", "x", code=2).output


def test_a_fit_that_was_ended_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "texts.jsonl"
    lines = (DATA / "french.jsonl").read_text("utf-8").splitlines()[:6]
    data.write_text("".join(json.dumps(json.loads(one)["positive"]) + "\n" for one in lines))
    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bookmark, "_SHARE", 0)
    whole = TransformersEngine.differentiate
    asked = 0

    def counted(left: int | None) -> None:
        def differentiate(self: Any, work: Any) -> Any:
            nonlocal asked
            if asked == left:
                raise EngineError("the machine is gone")
            asked += 1
            return whole(self, work)

        monkeypatch.setattr(TransformersEngine, "differentiate", differentiate)

    def fit(name: str, code: int = 0) -> str:
        options = ("--average", 1, "--tokens", 16, "--skip", 4, "--name", "reader")
        file = tmp_path / f"{name}.safetensors"
        return steer("fit", "jacobian-lens", data, *options, "--out", file, code=code).output

    counted(None)
    assert "going on" not in fit("whole")
    pieces, asked = asked, 0
    counted(10)
    assert "the machine is gone" in fit("ended", code=2)
    counted(None)
    assert "going on where it was ended" in fit("again")
    assert asked == pieces > 10
    files = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("whole", "again")]
    assert files[0] == files[1]
    assert not list((tmp_path / "cache" / "making").iterdir())
