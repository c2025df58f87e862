"""Fits on kept states come to what they come to on the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.sae import load_directory
from steer.cli.app import app as cli
from steer.cli.steering import read_vector_file
from steer.engines.base import CaptureRequest, Engine, GenerationRequest
from steer.engines.fake.engine import ByteTokenizer
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError, Unsupported
from steer.fit import SaidText, fit_concepts, said_texts
from steer.fit.bulk.kept import StatesEngine
from steer.fit.data.labels import Labelled, LabelledSet
from steer.fit.data.pairs import Pair, PairSet
from steer.fit.methods.detectors.fitting import fit_detector
from steer.fit.methods.fitting import fit
from steer.fit.methods.linear.conceptor import fit_conceptor
from steer.fit.methods.one_vs_rest import fit_labels
from steer.fit.requests.states import StatesRequest
from steer.model import HookPoint

PAIRS = PairSet.of([Pair(f"{n} is a happy day", f"{n} is a sad day!") for n in range(24)])
LABELLED = LabelledSet.of(
    [Labelled(f"{n} says {word}{'!' * (n % 3)}", word) for n in range(60) for word in ("yes", "no")]
)
JUDGED = LabelledSet.of(
    [Labelled(f"{n} is {'bad' if n % 2 else 'good'}", str(n % 2 == 1).lower()) for n in range(160)]
)


def kept(engine: Engine, prompts: Sequence[Any], folder: Path, **more: Any) -> StatesEngine:
    StatesRequest.model_validate({"prompts": prompts, "layers": (1, 2), **more}).run(engine, folder)
    return StatesEngine(folder, ByteTokenizer())


def same(mine: ControlVector, theirs: ControlVector) -> None:
    assert mine.card.layers == theirs.card.layers
    assert mine.card.used_layers == theirs.card.used_layers
    for layer in theirs.card.layers:
        torch.testing.assert_close(mine[layer], theirs[layer], rtol=1e-4, atol=1e-5)


def test_vectors_of_pairs(lively: TransformersEngine, tmp_path: Path) -> None:
    every = [side for one in PAIRS.items for side in (one.positive, one.negative)]
    states = kept(lively, every, tmp_path)
    for options in ({"method": "diffmean"}, {"method": "logistic", "positions": "mean"}):
        mine, theirs = (
            fit(engine, PAIRS, name="v", layers=[1, 2], **options)  # type: ignore[arg-type]
            for engine in (states, lively)
        )
        same(mine, theirs)


def test_vectors_of_labels_from_last_tokens_alone(
    lively: TransformersEngine, tmp_path: Path
) -> None:
    texts = [one.prompt for one in LABELLED.items]
    states = kept(lively, texts, tmp_path, where={"positions": [[-1, None]]})
    mine, theirs = (
        fit_labels(engine, LABELLED, name="v", layers=[1, 2]) for engine in (states, lively)
    )
    for label, vector in theirs.items():
        same(mine[label], vector)
    with pytest.raises(SteerError, match="it holds 1: capture the same texts") as caught:
        fit_labels(states, LABELLED, name="v", layers=[1, 2], positions="mean")
    assert caught.value.code == "states_not_kept"


def test_a_probe_reads_beginnings_of_kept_texts(lively: TransformersEngine, tmp_path: Path) -> None:
    """Of each text the states up to the token that is read, which stands elsewhere in each."""
    texts = [
        (f"{'so ' * (n % 4)}{mood} it is, {n}", mood) for n in range(24) for mood in ("dry", "wet")
    ]
    said = said_texts(
        [SaidText.model_validate({"text": text, "pairs": {"mood": mood}}) for text, mood in texts]
    )
    states = kept(lively, [text for text, _ in texts], tmp_path)
    how: dict[str, Any] = {"name": "p", "layers": [1, 2], "position": "it", "dimensions": 256}
    mine, theirs = (fit_concepts(engine, said, **how) for engine in (states, lively))
    assert mine.form.measures == theirs.form.measures
    with pytest.raises(SteerError, match="begins with 'other'") as caught:
        states.capture(CaptureRequest([list(b"other")], [HookPoint(1)], (-1,)))
    assert caught.value.code == "states_not_kept"


def test_a_beginning_of_which_a_token_is_missing_is_not_kept(
    lively: TransformersEngine, tmp_path: Path
) -> None:
    states = kept(lively, ["a happy day"], tmp_path, where={"positions": [[0, 3], [4, None]]})
    whole = ByteTokenizer().encode("a happy day")
    states.capture(CaptureRequest([whole, whole[:3]], [HookPoint(1)], (-1,)))
    with pytest.raises(SteerError) as caught:
        states.capture(CaptureRequest([whole[:8]], [HookPoint(1)], (-1,)))
    assert caught.value.code == "states_not_kept"


def test_detectors_and_adapters(lively: TransformersEngine, tmp_path: Path) -> None:
    states = kept(lively, [one.prompt for one in JUDGED.items], tmp_path)
    mine, theirs = (
        fit_detector(engine, JUDGED, name="d", layers=[1, 2], rate=0.2)
        for engine in (states, lively)
    )
    assert mine.point == theirs.point
    assert mine.threshold == pytest.approx(theirs.threshold, rel=1e-3, abs=1e-3)
    texts = [one.prompt for one in JUDGED.items]
    adapters = [fit_conceptor(one, texts, name="c", layers=[1]) for one in (states, lively)]
    mine_bytes, theirs_bytes = (len(one.to_bytes()) for one in adapters)
    assert mine_bytes == theirs_bytes


def test_what_is_not_kept_is_told(lively: TransformersEngine, tmp_path: Path) -> None:
    states = kept(lively, ["a text"], tmp_path / "one", skip=1)
    tokens = ByteTokenizer().encode("a text")
    with pytest.raises(SteerError, match=r"at 0\.resid_post; it holds those at 1\.resid_post"):
        states.capture(CaptureRequest([tokens], (HookPoint(0),)))
    with pytest.raises(SteerError, match="a text of 2 tokens that begins with"):
        states.capture(CaptureRequest([tokens[:2]], (HookPoint(1),)))
    with pytest.raises(SteerError, match="every token of text 0"):
        states.capture(CaptureRequest([tokens], (HookPoint(1),)))
    [read] = states.capture(CaptureRequest([tokens], (HookPoint(1),), (-1, 1)))
    [alone] = lively.capture(CaptureRequest([tokens], (HookPoint(1),), (-1, 1)))
    torch.testing.assert_close(read.states[HookPoint(1)], alone.states[HookPoint(1)])
    for refused in (
        lambda: states.complete([GenerationRequest("a", (1,))]),
        lambda: states.capture(CaptureRequest([tokens], logits="last")),
    ):
        with pytest.raises(Unsupported, match="only its states are kept") as caught:
            refused()
        assert caught.value.code == "no_model"
    with pytest.raises(SteerError, match="states that are pooled"):
        kept(lively, ["a text"], tmp_path / "two", pooled="mean")


def test_the_command_fits_without_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, folder = tmp_path / "texts.jsonl", tmp_path / "states"
    lines = [{"text": one.prompt, "label": one.label} for one in LABELLED.items[:24]]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def steer(*arguments: object, code: int = 0) -> str:
        done = CliRunner().invoke(cli, [str(one) for one in arguments])
        assert done.exit_code == code, done.output
        return " ".join(done.output.split())

    steer("capture", data, folder, "--layers", "2,3", "--where", "last")
    steer("fit", "labels", data, "--name", "v", "--layers", "2,3", "--out", tmp_path / "theirs")
    with monkeypatch.context() as patched:
        patched.setattr(TransformersEngine, "load", None)
        states = ("--states", folder)
        steer("fit", "labels", data, "--name", "v", *states, "--out", tmp_path / "mine")
        assert "states_not_kept" in steer(
            "fit", "labels", data, *states, "--site", "mlp_out", code=2
        )
    for name in ("v-yes", "v-no"):
        mine, theirs = (
            read_vector_file(tmp_path / side / f"{name}.safetensors") for side in ("mine", "theirs")
        )
        same(mine, theirs)


def test_the_command_trains_an_sae_without_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "cache"))
    data, folder = tmp_path / "texts.jsonl", tmp_path / "states"
    data.write_text("".join(json.dumps(one.prompt) + "\n" for one in LABELLED.items[:40]))

    def steer(*arguments: object) -> None:
        done = CliRunner().invoke(cli, [str(one) for one in arguments])
        assert done.exit_code == 0, done.output

    train = ("sae", "train", data, "--name", "s", "--layer", 2, "--latents", 16, "--k", 2)
    train += ("--rows", 32, "--held-out", 0.4)
    steer("capture", data, folder, "--layers", 2, "--context", 256)
    steer(*train, "--out", tmp_path / "theirs")
    with monkeypatch.context() as patched:
        patched.setattr(TransformersEngine, "load", None)
        steer(*train, "--states", folder, "--out", tmp_path / "mine")
    mine, theirs = (load_directory(tmp_path / side) for side in ("mine", "theirs"))
    assert theirs.card.provenance["loss"] is not None
    assert mine.card.provenance.get("loss") is None
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=1e-2, atol=1e-3)
