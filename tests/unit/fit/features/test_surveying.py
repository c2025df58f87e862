"""Surveys through an engine: kept, gone on with, and true of what the engine reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from steer.artefacts.sae.base import SAE
from steer.engines.base import CaptureRequest
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit import states
from steer.fit.features import surveying
from steer.fit.features.surveying import SurveyPlace, survey
from steer.fit.states import prompt_tokens
from steer.model import HookPoint
from steer.registry.registry import Registry
from steer.spec import Where

TEXTS = [f"text {n}: {'abc ' * (n % 5)}{chr(97 + n)}" for n in range(20)]


@pytest.fixture
def registry(tmp_path: Path, engine: TransformersEngine) -> Iterator[Registry]:
    with Registry.open(tmp_path / "registry") as opened:
        opened.add("s", small_sae(engine.info.width("resid_post")))
        yield opened


def small_sae(width: int, d_sae: int = 50) -> SAE:
    generator = torch.Generator().manual_seed(0)
    return SAE.of(
        "relu",
        W_enc=torch.randn(width, d_sae, generator=generator),
        b_enc=torch.linspace(-9, 0, d_sae) * 0.01,
        W_dec=torch.randn(d_sae, width, generator=generator),
        b_dec=torch.zeros(width),
        layer=1,
    )


def surveyed(engine: TransformersEngine, registry: Registry, tmp_path: Path, **options: object):
    entry = registry.entry("sae", "s")
    place = SurveyPlace(registry.surveys, tmp_path)
    return survey(engine, registry.sae("s"), entry.sha256, TEXTS, place, **options)


def test_a_survey_counts_what_the_engine_reads(
    engine: TransformersEngine, registry: Registry, tmp_path: Path
) -> None:
    found = surveyed(engine, registry, tmp_path)
    ids = [list(engine.tokenizer.encode(text)) for text in TEXTS]
    point = HookPoint(1)
    captured = engine.capture(CaptureRequest(ids, (point,)))
    states = [one.states[point][1:] for one in captured]  # without the beginning
    active = registry.sae("s").encode(torch.cat(states)).numpy()
    assert found.card.tokens == len(active)
    assert np.abs(found.array("fired") - (active > 0).sum(0)).max() <= 1
    np.testing.assert_allclose(found.array("largest"), active.max(0), rtol=1e-4, atol=1e-5)
    feature = int(active.max(0).argmax())
    one = found.feature(feature)
    assert one.top[0].value == pytest.approx(active.max(), rel=1e-4)
    assert one.top[0].tokens[one.top[0].at] == TEXTS[one.top[0].text][one.top[0].position - 1]
    assert sum(one.histogram) == one.fired
    assert len(one.edges) == len(one.histogram) + 1
    assert found.text(3) == ids[3]


def test_only_selected_tokens_are_counted(
    engine: TransformersEngine, registry: Registry, tmp_path: Path
) -> None:
    """Texts without such a token count none."""
    where = Where.model_validate({"after": ["abc"]})
    found = surveyed(engine, registry, tmp_path, where=where)
    ids = [list(engine.tokenizer.encode(text)) for text in TEXTS]
    point = HookPoint(1)
    captured = engine.capture(CaptureRequest(ids, (point,)))
    states = [
        one.states[point][1 + text.index("abc") + 3 :]
        for one, text in zip(captured, TEXTS, strict=True)
        if "abc" in text
    ]
    active = registry.sae("s").encode(torch.cat(states)).numpy()
    assert found.card.where == where
    assert found.card.tokens == len(active)
    np.testing.assert_allclose(found.array("largest"), active.max(0), rtol=1e-4, atol=1e-5)
    best = found.feature(int(active.max(0).argmax())).top[0]
    assert best.value == pytest.approx(active.max(), rel=1e-4)
    text = TEXTS[best.text]
    assert best.tokens[best.at] == text[best.position - 1]
    assert best.position > 1 + text.index("abc") + 2
    assert found.card.data != surveyed(engine, registry, tmp_path).card.data
    with pytest.raises(SteerError) as caught:
        surveyed(engine, registry, tmp_path, where=Where.model_validate({"after": ["nowhere"]}))
    assert (caught.value.code, caught.value.param) == ("nothing_selected", "/where")


class Ended(Exception):
    pass


def test_a_survey_that_was_ended_goes_on_and_finds_the_same(
    engine: TransformersEngine, registry: Registry, tmp_path: Path
) -> None:
    whole = surveyed(engine, registry, tmp_path, batch=1)
    expected = {name: whole.array(name) for name in whole.offsets}
    done = []

    def count(texts: int) -> None:
        done.append(texts)
        if sum(done) == 15:
            raise Ended

    with pytest.raises(Ended):
        surveyed(engine, registry, tmp_path, batch=1, checkpoint_tokens=50, progress=count)
    again: list[int] = []
    found = surveyed(
        engine, registry, tmp_path, batch=1, checkpoint_tokens=50, progress=again.append
    )
    assert again[0] > 5
    assert sum(again) == len(TEXTS)
    for name, array in expected.items():
        assert array.tobytes() == found.array(name).tobytes(), name
    assert not list((tmp_path / "registry" / "features").glob("*.partial"))


def test_an_sae_of_another_width_is_refused(
    engine: TransformersEngine, registry: Registry, tmp_path: Path
) -> None:
    registry.add("s", small_sae(engine.info.width("resid_post") + 1))
    with pytest.raises(SteerError) as raised:
        surveyed(engine, registry, tmp_path)
    assert (raised.value.code, raised.value.param) == ("wrong_width", "/sae")


def test_each_text_is_tokenized_once(
    engine: TransformersEngine,
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[object] = []

    def counted(engine: TransformersEngine, prompt: str) -> list[int]:
        asked.append(prompt)
        return prompt_tokens(engine, prompt)

    for module in (states, surveying):
        monkeypatch.setattr(module, "prompt_tokens", counted)
    surveyed(engine, registry, tmp_path)
    assert asked == TEXTS
