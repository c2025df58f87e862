"""What is measured of an SAE's features on vLLM is what the reference finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import vllm_engine
from steer_vectors import LIBRARY

from steer.artefacts.sae.saelens import load_directory
from steer.engines.transformers.engine import TransformersEngine
from steer.fit.features.effect import EffectOptions, output_effects

pytestmark = pytest.mark.slow

LATENT = 809
"""The demo's SAE card says that this one makes it answer in French."""


def test_a_feature_does_the_same_on_both_engines(tmp_path: Path) -> None:
    sae = load_directory(LIBRARY / "demo" / "saes" / "resid-3")
    options = EffectOptions(kl=0.3, nulls=3, max_tokens=8)
    questions = ["How are you?", "What is rain?"]
    with TransformersEngine.load(str(vllm_engine.DEMO_MODEL), dtype="float32") as reference:
        [expected] = output_effects(reference, sae, [LATENT], questions, options)
    with vllm_engine.start_engine(tmp_path / "registry") as running:
        [found] = output_effects(running, sae, [LATENT], questions, options)
    assert found.kl == pytest.approx(0.3, rel=0.05)
    assert found.strength == pytest.approx(expected.strength, rel=0.05)
    assert {one.id for one in found.promoted} & {one.id for one in expected.promoted}
    assert found.written is not None
    assert expected.written is not None
    assert found.written.change == pytest.approx(expected.written.change, rel=0.1)
    assert found.verdict == expected.verdict
