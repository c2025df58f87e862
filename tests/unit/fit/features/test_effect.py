"""Does a feature cause? Planted: one that writes what it fires on, and one that writes something
else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steer.artefacts.sae.base import SAE
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit.features.effect import (
    EffectGround,
    EffectOptions,
    _verdict,
    check_raisable,
    corrected,
    drawn_nulls,
    output_effects,
)
from steer.fit.features.surveying import SurveyPlace, survey
from steer.fit.measure.nulls.matching import Match
from steer.registry.features.effect import OutputEffect, OutputVerdict, TargetEffect
from steer.registry.features.survey import Survey
from steer.registry.registry import Registry

LAYER = 2
TEXTS = [f"{word} {n}" for n in range(6) for word in ("fox", "yak", "emu")]
QUESTIONS = ["How are you?", "What is rain?", "Tell me of birds."]
OPTIONS = EffectOptions(kl=0.3, max_tokens=8, nulls=10)
PLANTED, ASTRAY = 0, 1
ELSEWHERE = ord("Q")


def letters(engine: TransformersEngine) -> torch.Tensor:
    """`[vocab, d]`: what raises each token at the last layer."""
    return engine.unembed(torch.eye(engine.info.d_model)).T


@pytest.fixture
def surveyed(
    lively: TransformersEngine, tmp_path: Path
) -> Iterator[tuple[TransformersEngine, SAE, Survey]]:
    """An SAE whose feature `PLANTED` writes the tokens on which it fires, and `ASTRAY` another
    one, that no text has."""
    width = lively.info.d_model
    generator = torch.Generator().manual_seed(1)
    W_enc = torch.randn(width, 60, generator=generator)
    W_enc[:, PLANTED] = letters(lively)[ord("x")] * 10
    W_dec = torch.randn(60, width, generator=generator)
    given = {"b_dec": torch.zeros(width), "layer": LAYER}
    blank = SAE.of("relu", W_enc=W_enc, W_dec=W_dec, **given)
    with Registry.open(tmp_path / "registry") as registry:
        entry, _ = registry.add("s", blank)
        place = SurveyPlace(registry.surveys, tmp_path)
        found = survey(lively, blank, entry.sha256, TEXTS, place)
        fired = {found.text(one.text)[one.position] for one in found.feature(PLANTED).top}
        W_dec[PLANTED] = letters(lively)[sorted(fired)].sum(0)
        W_dec[ASTRAY] = letters(lively)[ELSEWHERE]
        yield lively, SAE.of("relu", W_enc=W_enc, W_dec=W_dec, **given), found


def test_what_is_written_is_told_from_what_is_fired_on(
    surveyed: tuple[TransformersEngine, SAE, Survey],
) -> None:
    engine, sae, found = surveyed
    causes, writes = output_effects(
        engine, sae, [PLANTED, ASTRAY], QUESTIONS, OPTIONS, survey=found
    )
    assert (causes.verdict, writes.verdict) == ("causes", "writes")
    for one in (causes, writes):
        assert one.reached
        assert one.kl == pytest.approx(OPTIONS.kl, rel=0.05)
        assert one.nulls == 2 * OPTIONS.nulls
        assert one.written is not None
        assert one.written.change > one.written.strongest
        changes = [token.change for token in one.promoted]
        assert changes == sorted(changes, reverse=True)
    assert writes.promoted[0].token == chr(ELSEWHERE)
    assert writes.detected is not None
    assert writes.detected.p > 0.05


def test_features_measured_together_are_as_they_are_alone(
    surveyed: tuple[TransformersEngine, SAE, Survey],
) -> None:
    engine, sae, _ = surveyed
    few = EffectOptions(kl=0.3, max_tokens=4, nulls=0)
    together = output_effects(engine, sae, [PLANTED, ASTRAY], QUESTIONS, few)
    [alone] = output_effects(engine, sae, [ASTRAY], QUESTIONS, few)
    assert together[1].strength == pytest.approx(alone.strength, rel=1e-3)
    assert together[1].promoted[0].id == alone.promoted[0].id
    assert alone.verdict == "unknown"  # nothing was held against it


def test_nulls_know_nothing_of_the_features(
    surveyed: tuple[TransformersEngine, SAE, Survey],
) -> None:
    engine, sae, _ = surveyed
    near = torch.cat([sae.W_dec, sae.W_dec[[PLANTED]] * 3])
    twin = SAE.of(
        "relu",
        W_enc=torch.cat([sae.W_enc, sae.W_enc[:, [PLANTED]]], 1),
        W_dec=near,
        b_dec=sae.b_dec,
        layer=LAYER,
    )
    ground = EffectGround.of(engine, twin, QUESTIONS, EffectOptions(nulls=30, max_tokens=4))
    nulls = drawn_nulls(ground, [PLANTED])
    assert len(nulls) == 60
    row = sae.W_dec[PLANTED] / sae.W_dec[PLANTED].norm()
    cosines = [float(one[LAYER] @ row) for one in nulls[:30]]
    assert max(map(abs, cosines)) < 0.5
    assert all(float(one[LAYER].norm()) == pytest.approx(1) for one in nulls)


def test_what_is_looked_at_together_is_corrected_together() -> None:
    def effect(written: float | None, detected: float | None) -> OutputEffect:
        return OutputEffect(
            feature=0, model="m", prompts=1, strength=1.0, kl=0.2, reached=True, nulls=20,
            promoted=(), demoted=(), verdict="unknown",
            written=None if written is None else target(written),
            detected=None if detected is None else target(detected),
        )  # fmt: skip

    one, other, third = corrected([effect(0.05, 0.2), effect(0.5, None), effect(0.4, 0.1)])
    assert one.written is not None
    assert one.written.q == pytest.approx(0.15)  # of three
    assert one.detected is not None
    assert one.detected.q == pytest.approx(0.2)  # of two
    assert other.detected is None
    assert third.written is not None
    assert third.written.q == pytest.approx(0.5)
    [alone] = corrected([effect(0.05, None)])
    assert alone.written is not None
    assert alone.written.q == pytest.approx(0.05)


def target(p: float) -> TargetEffect:
    return TargetEffect(tokens=("a",), change=0.1, null=0.0, strongest=0.2, p=p)


@pytest.mark.parametrize(
    ("reached", "written", "detected", "verdict"),
    [
        (True, 0.01, 0.01, "causes"),
        (True, 0.5, 0.01, "causes"),
        (True, 0.01, 0.5, "writes"),
        (True, 0.01, None, "writes"),
        (True, 0.5, 0.5, "detects"),
        (True, 0.5, None, "detects"),
        (True, None, None, "unknown"),
        (False, 0.01, 0.01, "unknown"),
    ],
)
def test_verdicts(
    reached: bool, written: float | None, detected: float | None, verdict: OutputVerdict
) -> None:
    match = Match(1.0, 0.2, 3, reached)
    given = [None if p is None else target(p) for p in (written, detected)]
    assert _verdict(match, *given) == verdict


def test_what_cannot_be_raised_is_refused(lively: TransformersEngine) -> None:
    width = lively.info.d_model
    one = SAE.of(
        "relu",
        W_enc=torch.randn(width, 4),
        W_dec=torch.randn(4, width),
        b_dec=torch.zeros(width),
        layer=1,
        site="mlp_in",
        write_site="mlp_out",
        subtract_b_dec=False,
    )
    check_raisable(lively, one, 0)  # a transcoder is raised where it writes
    deep = replace(one, card=one.card.model_copy(update={"layers": (9,)}))
    with pytest.raises(SteerError) as raised:
        check_raisable(lively, deep, 0)
    assert (raised.value.code, raised.value.param) == ("layer_out_of_range", "/sae")
