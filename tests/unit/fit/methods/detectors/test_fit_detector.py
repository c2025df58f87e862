"""Detectors are fitted, chosen and measured on texts that share nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from steer.cli import app
from steer.engines.base import CaptureRequest
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit import Labelled, LabelledSet, fit_detector
from steer.fit.methods.detectors.parts import divided
from steer.fit.methods.detectors.plot import plot_roc
from steer.fit.methods.detectors.probe import fit_probe, neighbour_scores
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions

WORDS = ("fog", "rain", "snow", "wind", "sun", "ice")
TEXTS = LabelledSet.of(
    [
        Labelled(f"{word} {'!!' if loud else 'or'} {number}", str(loud).lower())
        for word in WORDS
        for number in range(6)
        for loud in (True, False)
    ]
)


def test_the_parts_share_no_text() -> None:
    doubled = LabelledSet.of([*TEXTS.items, *TEXTS.items])
    parts = divided(doubled, 0.3, seed=1)
    each = (parts.fitted, parts.validation, parts.calibration, parts.held_out)
    prompts = [prompt for part in each for prompt in part.prompts]
    assert sorted(prompts) == sorted(one.prompt for one in TEXTS.items)
    assert parts.calibration.positive == ()
    assert all(" !! " in str(text) for part in each for text in part.positive)
    assert not any(" !! " in str(text) for part in each for text in part.negative)


@pytest.mark.parametrize(
    ("texts", "code"),
    [
        (LabelledSet.of([Labelled("a", "true"), Labelled("b", "calm")]), "invalid_labels"),
        (LabelledSet.of(TEXTS.items[:10]), "too_few_texts"),
        (LabelledSet.of(TEXTS.items[::2]), "invalid_labels"),
    ],
)
def test_what_no_detector_can_be_fitted_to(
    engine: TransformersEngine, texts: LabelledSet, code: str
) -> None:
    with pytest.raises(SteerError) as raised:
        fit_detector(engine, texts, name="x")
    assert raised.value.code == code


@pytest.mark.parametrize(("pooling", "last"), [("max", 1), ("mean", 3)])
def test_what_its_card_says_is_what_it_does(
    engine: TransformersEngine, pooling: str, last: int
) -> None:
    read: list[int] = []
    found = fit_detector(
        engine,
        TEXTS,
        name="loud",
        pooling=pooling,
        last=last,
        rate=0.2,
        batch=5,
        progress=read.append,
    )
    assert sum(read) == len(TEXTS)
    measures = found.detection.measures
    assert measures is not None
    held = divided(TEXTS, 0.3, 0).held_out

    def score(text: str) -> float:
        tokens = engine.tokenizer.encode(text)
        (captured,) = engine.capture(CaptureRequest([tokens], (found.point,)))
        window = found.window()
        watched = captured.states[found.point][1:]
        return max(map(window.push, found.scores(watched).tolist()))

    fired = [score(str(text)) > found.threshold for text in held.prompts]
    cut = len(held.positive)
    assert measures.true_positive_rate == pytest.approx(sum(fired[:cut]) / cut)
    assert measures.false_positive_rate == pytest.approx(sum(fired[cut:]) / (len(fired) - cut))
    assert measures.auroc.value > 0.9
    assert measures.probe.value > measures.shuffled.value
    assert (found.detection.pooling, found.detection.last) == (pooling, last)
    assert found.card.provenance["tokens"] == "all"


def test_the_batch_changes_nothing(engine: TransformersEngine) -> None:
    one = fit_detector(engine, TEXTS, name="loud", layers=[1], batch=1)
    other = fit_detector(engine, TEXTS, name="loud", layers=[1], batch=16)
    torch.testing.assert_close(one.direction, other.direction, rtol=1e-3, atol=1e-4)
    assert one.threshold == pytest.approx(other.threshold, abs=1e-3)


def test_a_promise_that_cannot_be_kept_is_refused_before_reading(
    engine: TransformersEngine,
) -> None:
    read: list[int] = []
    with pytest.raises(SteerError) as raised:
        fit_detector(
            engine, TEXTS, name="x", threshold="conformal", rate=0.01, progress=read.append
        )
    assert (raised.value.code, read) == ("too_few_safe_texts", [])
    assert "99" in raised.value.message


def test_a_probe_finds_a_planted_direction() -> None:
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(200, 8, generator=generator)
    states[:, 3] *= 100  # a channel that is large and says nothing
    labels = states[:, 0] > 0
    probe = fit_probe(states[:150], labels[:150])
    right = (probe.scores(states[150:]) > 0) == labels[150:]
    assert right.double().mean() > 0.9
    votes = neighbour_scores(states[:150], labels[:150], states[150:])
    assert bool(((votes >= 0) & (votes <= 1)).all())
    assert votes[labels[150:]].mean() > votes[~labels[150:]].mean()


@pytest.mark.slow
def test_the_command_shows_and_draws(tmp_path: Path) -> None:
    data = tmp_path / "loud.jsonl"
    rows = [
        f'{{"text": "{one.prompt}", "label": {one.label}}}'  # true and false, not their names
        for one in TEXTS.items
    ]
    data.write_text("\n".join(rows))
    arguments = ("fit", "detector", data, "--model", "steer-demo", "--layers", "2,3")
    out, plot = tmp_path / "loud.safetensors", tmp_path / "roc.png"
    shown = CliRunner().invoke(app, [*map(str, (*arguments, "--out", out, "--plot", plot))])
    assert shown.exit_code == 0, shown.output
    assert "nearest neighbours" in shown.output
    assert "held out: fires on" in shown.output
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = read_artefact(out, ImportOptions(), scratch=None, unpacked_limit=0)
    assert found.card.kind == "detector"
    with pytest.raises(SteerError, match="cannot be written"):
        plot_roc(found, tmp_path / "no" / "where.png")


@pytest.mark.parametrize(("yes", "no"), [("1", "0"), ("yes", "no"), ("True", "FALSE")])
def test_labels_mean_what_tables_mean_by_them(yes: str, no: str) -> None:
    names = {"true": yes, "false": no}
    renamed = LabelledSet.of([Labelled(one.prompt, names[one.label]) for one in TEXTS.items])
    assert divided(renamed, 0.3, seed=1) == divided(TEXTS, 0.3, seed=1)


def test_a_text_with_both_labels_is_refused_by_name() -> None:
    first = TEXTS.items[0]
    other = "false" if first.label == "true" else "true"
    with pytest.raises(SteerError, match="labelled true in one place and false") as caught:
        divided(LabelledSet.of([*TEXTS.items, Labelled(first.prompt, other)]), 0.3, seed=1)
    assert caught.value.code == "invalid_labels"
    assert str(first.prompt)[:20] in str(caught.value)
