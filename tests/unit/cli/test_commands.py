"""The command line on the demo model, through typer's runner."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_corpus import steering_vector_class
from typer.testing import CliRunner, Result

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.detector import Detector
from steer.cli import app
from steer.cli.reference import reference
from steer.engines.transformers.checkpoints.shipped import add_shipped
from steer.errors import SteerError
from steer.formats.options import ImportOptions
from steer.formats.vectors.gguf import read_gguf
from steer.registry.registry import Registry
from steer.spec import EffectStrength

ROOT = Path(__file__).parents[3]
DATA = ROOT / "vectors" / "demo" / "data"
SPEC = {"interventions": [{"kind": "add", "vector": "french"}]}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry that has met the demo model: what comes with it is registered."""
    folder = tmp_path_factory.mktemp("registry")
    with Registry.open(folder) as opened:
        add_shipped(opened, "steer-demo")
    return folder


def steer(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def written(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from steer.cli import app; "
        "result = CliRunner().invoke(app, ['--help']); assert result.exit_code == 0; "
        "heavy = {'torch', 'transformers', 'matplotlib', 'fastapi', 'sqlalchemy'}; "
        "print(len(sys.modules)); sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Half of them Python's own; any of the packages above brings a thousand.
    assert int(done.stdout) < 700


def test_the_reference_is_up_to_date() -> None:
    assert (ROOT / "docs" / "cli.md").read_text("utf-8") == reference(), (
        "run: python -m steer.cli.reference docs/cli.md"
    )


def test_fit_writes_a_vector(tmp_path: Path) -> None:
    file = tmp_path / "french.safetensors"
    shown = steer("fit", DATA / "french.jsonl", "--out", file, "--layers", "1-3", "--best", 2)
    vector = ControlVector.from_bytes(file.read_bytes(), name="french")
    assert vector.card.layers == (1, 2, 3)
    assert len(vector.card.used_layers) == 2
    assert all((one.separation or 0) > 3 for one in vector.card.measures.values())
    assert "french: separation" in shown.output


def test_fit_registers_a_vector(registry: Path) -> None:
    arguments = ["fit", DATA / "german.jsonl", "--register", "--registry", registry, "-n", "mine"]
    assert "registered: mine@" in steer(*arguments, "--method", "pca").output
    assert "already registered" in steer(*arguments, "--method", "pca").output
    card = json.loads(steer("vectors", "show", "mine", "--registry", registry).output)["card"]
    assert card["provenance"]["method"] == "pca"


def test_an_empty_registry_says_where_the_library_comes_from(tmp_path: Path) -> None:
    for kind in ("vectors", "profiles"):
        shown = steer(kind, "list", "--registry", tmp_path)
        assert f"No {kind} yet" in shown.stderr
        assert json.loads(steer(kind, "list", "--json", "--registry", tmp_path).stdout) == []
    assert "No vectors" not in steer("vectors", "list", "f", "--registry", tmp_path).stderr
    steer("generate", "Hello!", "--vector", "french", "--registry", tmp_path)
    for kind in ("vectors", "profiles"):
        shown = steer(kind, "list", "--registry", tmp_path)
        assert "french" in shown.stdout
        assert not shown.stderr


def test_generate_shows_both_answers(registry: Path) -> None:
    ask = ["generate", "How do I clean a chair?", "--registry", registry, "--json"]
    answer = json.loads(steer(*ask, "--vector", "french").output)
    assert answer["default"].startswith("Here is how")
    assert answer["steered"].startswith("Voici comment")
    assert answer["steering"]["tokens_steered"] == 1
    shown = steer(*ask[:-1], "--vector", "french").output
    assert "Voici comment" in shown
    assert "Here is how" in shown


def test_the_same_steering_in_four_ways(registry: Path, tmp_path: Path) -> None:
    ask = ["generate", "How do I clean a chair?", "--registry", registry, "--json"]
    file = tmp_path / "out.safetensors"
    steer("vectors", "list", "--registry", registry)
    by_name = json.loads(steer(*ask, "--vector", "french").output)
    steer("vectors", "export", "french", "--out", file, "--registry", registry)
    ways = [
        ["--vector", file],
        ["--spec", written(tmp_path / "spec.json", SPEC)],
        ["--profile", "french"],
    ]
    for way in ways:
        other = json.loads(steer(*ask, *way).output)
        assert (other["default"], other["steered"]) == (by_name["default"], by_name["steered"])


def test_detectors_of_a_profile_and_of_the_command_watch_answers(
    registry: Path, tmp_path: Path
) -> None:
    place = ("--registry", registry)
    for name, bias in (("ever", 1e6), ("never", -1e6)):
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(Detector.of(torch.ones(192), layer=1, bias=bias).to_bytes())
        steer("vectors", "import", file, "--name", name, *place)
    armed = [{"name": "ever", "action": "stop"}, {"name": "never"}]
    profile = written(tmp_path / "watched.json", {"spec": SPEC, "detectors": armed})
    steer("profiles", "add", profile, *place)
    ask = ["generate", "How do I clean a chair?", *place]

    found = json.loads(steer(*ask, "--profile", "watched", "--json").output)
    assert found["detections"]["default"] == []
    [ever, never] = found["detections"]["steered"]
    assert (ever["name"], ever["fired"], never["fired"]) == ("ever", True, False)
    assert len(found["steered"].split()) <= 1 < len(found["default"].split())

    shown = steer(*ask, "--profile", "french", "--detector", "never", "--detector", "ever").output
    lines = " ".join(shown.split())
    for answer in ("default", "steered"):
        assert f"{answer}: the detector 'never' did not fire" in lines
        assert f"{answer}: the detector 'ever' fired at token" in lines

    reads = ["--inspect", '{"norms": [1], "tokens": "prompt"}', "--json"]
    entries = json.loads(steer(*ask, "--vector", "french", *reads).output)["readouts"]
    watched = [*ask, "--vector", "french", "--detector", "never", *reads]
    assert json.loads(steer(*watched).output)["readouts"] == entries

    for wrong, said in (("nobody", "nobody"), ("ever:shout", "NAME:stop")):
        refused = steer(*ask, "--vector", "french", "--detector", wrong, code=2).output
        assert said in refused
        assert "--detector" in refused


def test_sweep_prints_plots_and_writes_figures(registry: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = (DATA / "heldout.jsonl").read_text("utf-8").splitlines()[:12]
    prompts.write_text("\n".join(lines), "utf-8")
    plot, figures = tmp_path / "plot.png", tmp_path / "figures.json"
    shown = steer(
        *("sweep", "french", "--prompts", prompts, "--score", "demo:french"),
        *("--strengths", "0,1", "--plot", plot, "--json", figures, "--registry", registry),
    )
    assert "unsteered" in shown.output
    assert f"wrote {plot}" in shown.output
    assert plot.read_bytes().startswith(b"\x89PNG")
    read = json.loads(figures.read_text())
    assert read["doses"][0]["score"] == 0
    assert read["doses"][1]["score"] >= 0.8
    assert read["doses"][0]["loss"] == pytest.approx(read["unsteered"]["loss"])


def test_calibrate_then_ask_for_an_effect(registry: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = (DATA / "heldout.jsonl").read_text("utf-8").splitlines()[:12]
    prompts.write_text("\n".join(lines), "utf-8")
    common = ["--prompts", prompts, "--score", "demo:french", "--registry", registry]
    file, folder = tmp_path / "french.safetensors", tmp_path / "report"
    shown = steer(
        *("calibrate", "french", "--strengths", "0.5,0.7,1", "--out", file, "--report", folder),
        *common,
    )
    assert "calibrated range: strength 0 to 1" in shown.output
    assert f"wrote {file}" in shown.output
    assert {path.name for path in folder.iterdir()} == {
        "calibration.png",
        "report.json",
        "report.md",
    }
    card = ControlVector.from_bytes(file.read_bytes()).card
    assert card.calibration is not None
    assert (card.calibration.prompts, card.calibration.model) == (12, "steer-demo")

    question = ["generate", "How do I clean a chair?", "--registry", registry, "--json"]
    asked = json.loads(steer(*question, "--vector", file, "--strength", "effect=1").output)
    assert asked["steered"].startswith("Voici comment nettoyer")
    [settled] = asked["steering"]["strengths"]
    assert settled["requested"] == {"effect": 1.0}
    assert settled["strength"] == card.calibration.strength_for(EffectStrength(effect=1.0))
    refused = steer(*question, "--vector", "continent-Asia", "--strength", "auto", code=2)
    assert "not_calibrated" in refused.stderr
    assert "invalid_option" in steer(*question, "-v", "french", "-x", "kl", code=2).stderr

    again = ["calibrate", file, "--strengths", "0.5,0.7,1", "--register", "--json", *common]
    assert json.loads(steer(*again).output)["vector"] == "french"
    versions = steer("vectors", "list", "--registry", registry).output
    assert "french" in versions


def test_evaluate_prints_the_prompt_only_baseline(registry: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = (DATA / "heldout.jsonl").read_text("utf-8").splitlines()[:12]
    prompts.write_text("\n".join(lines), "utf-8")
    common = ["--prompts", prompts, "--score", "demo:german", "--registry", registry]
    arguments = ["evaluate", "german", "weak=german:0.2", "profile:german", *common]
    found = json.loads(steer(*arguments, "--instruction", "Answer in German.", "--json").output)
    assert [row["name"] for row in found["rows"]] == [
        "unsteered",
        "prompt only",
        "german",
        "weak",
        "profile:german",
    ]
    values = [row["score"]["value"] for row in found["rows"]]
    assert values[:4] == [0, 1, pytest.approx(1, abs=0.2), 0]
    assert values[4] == values[2]
    shown = steer(*arguments[:2], *common, "--report", tmp_path / "report")
    assert "told “Answers in German.” (card description, in the system message)" in shown.output
    assert (tmp_path / "report" / "evaluation.png").exists()


def test_evaluate_runs_a_suite_and_goes_on(registry: Path, tmp_path: Path) -> None:
    suite, folder = tmp_path / "mine.json", tmp_path / "report"
    concept = {
        "name": "german",
        "description": "German",
        "instruction": "Answer in German.",
        "score": "demo:german",
    }
    prompts = ["What is the weather like?", "Tell me about music.", "How are you?", "What is new?"]
    value = {"name": "mine", "concepts": [concept], "prompts": prompts, "factors": [0.01, 1.0]}
    suite.write_text(json.dumps(value), "utf-8")
    common = ["--suite", suite, "--registry", registry, "--nulls", "1"]
    arguments = ["evaluate", "{concept}", *common, "--report", folder]
    found = json.loads(steer(*arguments, "--json").output)
    assert [one["method"] for one in found["methods"]] == ["unsteered", "prompt only", "vector"]
    row = found["concepts"][0]["rows"][2]
    assert [factor for factor, _ in row["chosen_from"]] == [0.01, 1.0]
    assert row["concept"] >= found["concepts"][0]["rows"][0]["concept"]
    assert len(row["nulls"]["nulls"]) == 2
    assert {path.name for path in folder.iterdir()} == {
        "concepts",
        "report.json",
        "report.md",
        "suite.png",
    }
    shown = steer(*arguments).output
    assert "prompt only" in shown
    assert "1 concepts, 4 prompts" in shown


def test_a_suite_says_what_would_make_what_is_missing(registry: Path) -> None:
    failed = steer(
        "evaluate", "{concept}-v", "--suite", "smollm2", "--registry", registry, code=2
    ).stderr.replace("\n", " ")
    assert "cheerful-v" in failed
    assert "steer make 'You are bubbling over" in failed
    assert "'fit:diffmean'" in failed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["german", "--score", "regex:x"], "give --prompts, or a --suite"),
        (["german", "--suite", "smollm2", "--score", "regex:x"], "--score and --suite exclude"),
        (["german", "--suite", "nowhere.json"], "'nowhere.json' cannot be read"),
        (["german", "--suite", "smollm2", "--concepts", "sea,joy"], "has no concept 'joy'"),
        (["fit:magic", "--suite", "smollm2"], "magic"),
        (["german", "--concepts", "sea"], "--concepts is for a --suite"),
    ],
)
def test_what_evaluate_cannot_run(arguments: list[str], says: str, tmp_path: Path) -> None:
    failed = steer("evaluate", *arguments, "--registry", tmp_path, "-m", "nothing", code=2)
    assert says in failed.stderr.replace("\n", " ")


def test_vectors_come_and_go(tmp_path: Path) -> None:
    place = ["--registry", tmp_path / "registry"]
    file = tmp_path / "v.safetensors"
    file.write_bytes(ControlVector.of({1: torch.tensor([1.0, 2.0])}).to_bytes())
    assert "v@" in steer("vectors", "add", file, "--description", "two", *place).output
    assert (
        "already registered" in steer("vectors", "add", file, "--description", "two", *place).output
    )
    listed = json.loads(steer("vectors", "list", "--json", *place).output)
    assert [entry["name"] for entry in listed] == ["v"]
    assert "two" in steer("vectors", "list", *place).output
    out = tmp_path / "out.gguf"
    steer("vectors", "export", "v", "--out", out, *place)
    steer("vectors", "add", out, "--name", "again", *place)
    steer("vectors", "remove", "v", *place)
    assert "unknown_vector" in steer("vectors", "show", "v", *place, code=2).output
    assert json.loads(steer("vectors", "show", "again", *place).output)["card"]["width"] == 2


def test_profiles_come_and_go(tmp_path: Path, registry: Path) -> None:
    place = ["--registry", registry]
    file = written(tmp_path / "bonjour.json", SPEC)
    assert "saved bonjour" in steer("profiles", "add", file, *place).output
    assert json.loads(steer("profiles", "show", "bonjour", *place).output)["spec"] == SPEC
    assert "bonjour" in steer("profiles", "list", *place).output
    names = [one["name"] for one in json.loads(steer("profiles", "list", "--json", *place).output)]
    assert {"bonjour", "french", "compliant", "cautious"} <= set(names)
    watched = written(tmp_path / "watched.json", {"spec": SPEC, "detectors": [{"name": "nobody"}]})
    said = steer("profiles", "add", watched, *place, code=2).output
    assert "unknown_detector, at /detectors/0/name" in said
    bad = written(
        tmp_path / "bad.json", {"spec": SPEC, "detectors": [{"name": "a", "action": "x"}]}
    )
    assert "at /detectors/0/action" in steer("profiles", "add", bad, *place, code=2).output
    steer("profiles", "remove", "bonjour", *place)
    assert "unknown_profile" in steer("profiles", "show", "bonjour", *place, code=2).output


def test_validate_names_every_problem(tmp_path: Path, registry: Path) -> None:
    spec = written(
        tmp_path / "spec.json",
        {
            "interventions": [
                {"kind": "add", "vector": "nowhere"},
                {"kind": "add", "vector": "french", "layers": [99]},
            ]
        },
    )
    shown = steer("validate", spec, "--registry", registry, code=2).output
    assert "unknown_vector, at /interventions/0/vector" in shown
    assert "/interventions/1" in shown
    good = written(tmp_path / "good.json", SPEC)
    assert "valid, fingerprint" in steer("validate", good, "--registry", registry).output
    assert "well-formed" in steer("validate", good, "--syntax-only").output
    plan = json.loads(steer("validate", good, "--json", "--registry", registry).output)
    assert plan["interventions"][0]["kind"] == "add"


def test_inspect_reads_states(tmp_path: Path, registry: Path) -> None:
    place = ["--registry", registry]
    ask = "What is the capital of France?"
    png = tmp_path / "lens.png"
    steer("inspect", "logit-lens", ask, "--at", "-1", "--png", png, *place)
    assert png.read_bytes().startswith(b"\x89PNG")
    read = json.loads(steer("inspect", "logit-lens", ask, "--at", "-1", "--json", *place).output)
    assert read["layers"] == [0, 1, 2, 3, 4, 5]
    scoped = steer("inspect", "patchscope", ask, "--at", "France", "--layers", "0", *place)
    assert "Patchscope" in scoped.output
    along = steer("inspect", "activations", ask, "--vector", "french", "--at", "-1", *place)
    assert "Along french" in along.output
    asked = [*("inspect", "ask", ask, "-q", "Which language is it", "--layers", "1,3"), *place]
    told = steer(*asked).output
    assert "The same questions without the state" in told
    assert "nothing was trained to read states here" in told
    body = json.loads(steer(*asked, "--max-tokens", "3", "--json").output)
    assert [cell["layer"] for cell in body["cells"]] == [1, 3]
    assert set(body["cells"][0]["controls"]) == {"text", "shuffled", "none"}
    say = [ask, "--token", " Paris", *place]
    apart = steer("inspect", "attribution", *say, "--heads", "--neurons", "3").output
    assert "Logit of ' Paris'" in apart
    assert "MLP neurons that give most" in apart
    flows = ["inspect", "flow", *say, "--edges", "5", "--at", "France", "--at", "-1"]
    told = steer(*flows, "--png", tmp_path / "flow.png").output
    assert "What flows into ' Paris'" in told
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(steer(*flows, "--json").output)["edges"]) == 10
    traced = steer("inspect", "trace", *say, "--subject", "France", "--layers", "0,5").output
    assert "Causal trace of ' Paris'" in traced
    assert "with noise at the subject" in traced


def test_inspect_matches_vectors(tmp_path: Path, registry: Path) -> None:
    place = ["--registry", registry]
    told = steer("inspect", "match", "Bonjour, comment ça va ?", "--plain", *place).output
    assert "random directions like" in told
    texts = tmp_path / "texts.txt"
    texts.write_text("One line about rain and wind.\n\nAnother about bread and the sea.\n")
    named = ["-v", "french", "--background", texts, "--layers", "3", "--png", tmp_path / "m.png"]
    body = json.loads(steer("inspect", "match", "Bonjour", *named, "--json", *place).output)
    assert [(one["vector"], one["layer"]) for one in body["matches"]] == [("french", 3)]
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_clusters_states(tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    said = {"fr": ("Bonjour, mon ami.", "Il pleut encore."), "en": ("Good day.", "It rains.")}
    lines = [{"text": text, "label": label} for label, both in said.items() for text in both]
    texts.write_text("\n".join(map(json.dumps, lines)))
    asked = ["inspect", "clusters", texts, "--layer", "3", "--clusters", "2"]
    told = steer(*asked, "--png", tmp_path / "c.png").output
    assert "with shuffled labels" in told
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    run = json.loads(steer(*asked, "--json").output)
    steer("capture", texts, tmp_path / "kept", "--layers", "3", "--where", "last")
    kept = json.loads(steer(*asked, "--states", tmp_path / "kept", "--json").output)
    assert [one["cluster"] for one in kept["states"]] == [one["cluster"] for one in run["states"]]
    texts.write_text('"Good day."\n"Il pleut."\n')
    assert "purity" not in json.loads(steer(*asked, "--json").output)


def test_inspect_reads_concepts(tmp_path: Path) -> None:
    texts = tmp_path / "said.jsonl"
    said = [(f"{one} {other}", one, other) for one in ("red", "blue") for other in "abcde"]
    lines = [{"text": text, "pairs": {"colour": c, "letter": x}} for text, c, x in said]
    texts.write_text("\n".join(map(json.dumps, lines)))
    asked = ["inspect", "concepts", texts, "--read", "red a", "--dimensions", "256"]
    told = steer(*asked, "--png", tmp_path / "c.png").output
    assert "2 held-out texts, 8 taught" in told
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    body = json.loads(steer(*asked, "--layers", "2", "--json").output)
    assert [one["role"] for one in body["readings"][0]["roles"]] == ["colour", "letter"]
    texts.write_text('{"text": "no pairs"}\n')
    assert "an object of fillers by role" in steer(*asked, code=2).output


def test_inspect_reads_coordinates(tmp_path: Path, registry: Path) -> None:
    place = ["-v", "french", "-v", "german", "--layer", "3", "--registry", registry]
    said = ["Bonjour", "Guten Tag", "--plain", "--png", tmp_path / "c.png"]
    told = steer("inspect", "coordinates", *said, *place).output
    assert "by chance" in told
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    body = json.loads(
        steer("inspect", "coordinates", "Bonjour", "--origin", "zero", "--json", *place).output
    )
    assert (body["vectors"], len(body["points"])) == (["french", "german"], 1)


def test_inspect_reads_weights(tmp_path: Path, registry: Path) -> None:
    place = ["--registry", registry]
    assert "How far heads copy" in steer("inspect", "weights", "--layer", "5", *place).output
    picture = tmp_path / "neuron.png"
    neuron = ["--layer", "3", "--neuron", "5", "--top", "3", "--png", picture]
    told = steer("inspect", "weights", *neuron, *place).output
    assert "layer 3 writes" in told
    assert "by chance" in told
    assert picture.read_bytes().startswith(b"\x89PNG")
    head = steer("inspect", "weights", "--layer", "5", "--head", "3", "--token", " France", *place)
    assert "copying" in head.output
    vector = steer("inspect", "weights", "--vector", "french", "--layer", "3", "--json", *place)
    assert json.loads(vector.output)["readings"][0]["most"][0]["token"] == "Désolé"
    refused = steer("inspect", "weights", "--layer", "5", "--head", "6", *place, code=2).output
    assert "head_out_of_range" in refused


def test_foreign_files_are_imported_as_their_writer_counts(tmp_path: Path) -> None:
    place = ["--registry", tmp_path / "registry"]
    file = tmp_path / "evil_response_avg_diff.pt"
    torch.save(torch.arange(1.0, 6.0)[:, None].expand(5, 3).contiguous(), file)
    assert "layer_offset_required" in steer("vectors", "import", file, *place, code=2).output
    options = ["--from", "persona-vectors", "--name", "evil"]
    assert "evil@" in steer("vectors", "import", file, *options, *place).output
    card = json.loads(steer("vectors", "show", "evil", *place).output)["card"]
    assert card["layers"] == [0, 1, 2, 3]
    assert card["provenance"]["layer_names"]["0"] == "tensor[1]"


def test_a_single_row_goes_where_the_advice_puts_it(tmp_path: Path) -> None:
    place = ["--registry", tmp_path / "registry"]
    file = tmp_path / "direction.pt"
    torch.save(torch.ones(3), file)
    assert "layer_required" in steer("vectors", "add", file, *place, code=2).output
    options = ["--layers", "2"]
    assert "site_required" in steer("vectors", "add", file, *options, *place, code=2).output
    steer("vectors", "add", file, *options, "--from", "refusal-direction", *place)
    card = json.loads(steer("vectors", "show", "direction", *place).output)["card"]
    assert (card["site"], card["layers"]) == ("resid_pre", [2])


def test_a_hub_download_is_as_large_as_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def fetch(ref: object, *, offline: bool, max_bytes: int) -> None:
        asked.append(max_bytes)
        raise SteerError("too large", code="download_too_large")

    monkeypatch.setattr("steer.formats.hub.fetch", fetch)
    for options in ([], ["--max-hub-mib", "2048"]):
        steer("vectors", "import", "hf://org/repo/v.gguf", *options, code=2)
    assert asked == [512 << 20, 2048 << 20]


def test_a_tuned_lens_is_imported_and_read_through(tmp_path: Path) -> None:
    place = ["--registry", tmp_path / "registry"]
    folder = tmp_path / "lens"
    folder.mkdir()
    width, layers = 192, 6  # the demo model's
    state = {f"{n}.weight": torch.zeros(width, width) for n in range(layers)}
    state |= {f"{n}.bias": torch.zeros(width) for n in range(layers)}
    torch.save(state, folder / "params.pt")
    written(folder / "config.json", {"d_model": width, "num_hidden_layers": layers})
    assert "(lens)" in steer("vectors", "import", folder, "--name", "tuned", *place).output
    arguments = ["inspect", "logit-lens", "Bonjour", "--at", "-1", "--json", *place]
    through = json.loads(steer(*arguments, "--lens", "tuned").output)
    assert through["lens"].startswith("tuned@")
    # A lens of zeros translates nothing.
    assert through["cells"] == json.loads(steer(*arguments).output)["cells"]
    assert "unknown_lens" in steer(*arguments, "--lens", "other", code=2).output


def test_arrays_in_a_pickle_are_converted_as_told(tmp_path: Path) -> None:
    file = tmp_path / "mean.pkl"
    file.write_bytes(pickle.dumps(torch.ones(5, 3).numpy()))
    assert "layer_offset_required" in steer("vectors", "convert", file, code=2).output
    steer("vectors", "convert", file, "--from", "hidden-states")
    vector = ControlVector.from_bytes((tmp_path / "mean.safetensors").read_bytes())
    assert vector.card.layers == (0, 1, 2, 3)


def test_a_pickled_vector_is_converted(tmp_path: Path) -> None:
    file = tmp_path / "joy.pkl"
    with steering_vector_class() as made:
        file.write_bytes(pickle.dumps(made({2: torch.tensor([1.0, 2.0])}, "mlp")))
    assert "mlp_out" in steer("vectors", "convert", file).output
    vector = ControlVector.from_bytes((tmp_path / "joy.safetensors").read_bytes())
    assert vector[2].tolist() == [1.0, 2.0]
    place = ["--registry", tmp_path / "registry"]
    assert "pickle_refused" in steer("vectors", "add", file, *place, code=2).output
    file.write_bytes(pickle.dumps(Path))
    assert "names 'pathlib.Path'" in steer("vectors", "convert", file, code=2).output


def test_export_says_what_others_will_not_know(tmp_path: Path) -> None:
    place = ["--registry", tmp_path / "registry"]
    file = tmp_path / "v.safetensors"
    rows = {1: torch.ones(3), 2: torch.ones(3)}
    file.write_bytes(ControlVector.of(rows, default_layers=(2,)).to_bytes())
    steer("vectors", "add", file, *place)
    for format in ("gguf", "safetensors-plain"):
        out = tmp_path / f"out-{format}"
        result = steer("vectors", "export", "v", "--out", out, "--format", format, *place)
        assert out.exists()
        assert "not only 2" in result.stderr
    assert steer("vectors", "export", "v", "--out", tmp_path / "v2", *place).stderr == ""
    assert (tmp_path / "v2").read_bytes() == file.read_bytes()


def test_export_leaves_block_0_out_of_gguf_only_where_it_is_told_to(tmp_path: Path) -> None:
    place = ["--registry", tmp_path / "registry"]
    file, out = tmp_path / "v.safetensors", tmp_path / "out.gguf"
    file.write_bytes(ControlVector.of({n: torch.ones(3) for n in range(3)}).to_bytes())
    steer("vectors", "add", file, *place)
    for layers in ([], ["--layers", "0-1"]):
        refused = steer("vectors", "export", "v", "--out", out, *layers, *place, code=2)
        assert "layer_not_exportable" in refused.stderr
        assert not out.exists()
    assert "--layers 1," in refused.stderr
    steer("vectors", "export", "v", "--out", out, "--layers", "1-2", *place)
    assert list(read_gguf(out, ImportOptions()).directions) == [1, 2]
    for wrong in ("3-1", "1,1", "x", ""):
        refused = steer(
            "vectors", "export", "v", "--out", tmp_path / "no", "--layers", wrong, *place, code=2
        )
        assert "invalid_option" in refused.stderr, wrong
    assert not (tmp_path / "no").exists()
