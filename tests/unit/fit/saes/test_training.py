"""Trained SAEs: planted dictionaries are found, a training that was ended goes on to the bit, and
what was trained runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from steer.errors import SteerError
from steer.fit.bulk.card import CaptureCard, CapturedPoint
from steer.fit.bulk.shards import CapturedStates, add_shard
from steer.fit.saes.loss import loss_of
from steer.fit.saes.measures import measure
from steer.fit.saes.network import RowUnits, SAENetwork
from steer.fit.saes.options import TRAINED, SAEOptions, Trained
from steer.fit.saes.plot import plot_training
from steer.fit.saes.rows import TrainingRows
from steer.fit.saes.trainer import Trainer, units_of
from steer.fit.saes.training import train_sae
from steer.model import HookPoint, ModelInfo

WIDTH, PLANTED, TEXTS = 32, 48, 40


def planted(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """States that are sums of few planted directions: states, directions, coefficients."""
    generator = torch.Generator().manual_seed(7)
    directions = functional.normalize(torch.randn(PLANTED, WIDTH, generator=generator), dim=-1)
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(count, PLANTED, generator=generator) < 0.06
    sizes = on * (torch.rand(count, PLANTED, generator=generator) + 0.5)
    return sizes @ directions * 5 + 3.0, directions, sizes


def captured(folder: Path, states: Tensor, texts: int = TEXTS) -> CapturedStates:
    """`states` as a capture of two shards, a text after the other."""
    card = CaptureCard(
        info=ModelInfo("planted", "none", 3, states.shape[1], 1, 1),
        engine="none",
        points=(CapturedPoint(layer=2, site="resid_post", width=states.shape[1]),),
        dtype="float32",
        pooled="none",
        stride=1,
        skip=0,
        answer_tokens=0,
        texts=texts,
        texts_sha256="0" * 64,
    )
    number = torch.arange(len(states)) * texts // len(states)
    for first, last in ((0, texts // 2), (texts // 2, texts)):
        here = (number >= first) & (number < last)
        places = torch.zeros(int(here.sum()), dtype=torch.int32)
        arrays = {
            "token": places,
            "text": number[here].to(torch.int32),
            "position": places.clone(),
            "generated": places.to(torch.uint8),
            "item": torch.zeros(texts // 2, dtype=torch.int32),
            "length": torch.zeros(texts // 2, dtype=torch.int32),
            "digest": torch.zeros(texts // 2, 16, dtype=torch.uint8),
            "2.resid_post": states[here],
        }
        card = add_shard(folder, card, arrays, last)
    return CapturedStates.open(folder)


def options(architecture: Trained, **others: object) -> SAEOptions:
    given = {"latents": 64, "k": 3, "rate": 3e-3, "batch": 256, "epochs": 24.0, **others}
    return SAEOptions(architecture=architecture, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", TRAINED)
def test_a_planted_dictionary_is_found(tmp_path: Path, architecture: Trained) -> None:
    states, directions, _ = planted(8000, 1)
    capture = captured(tmp_path / "states", states)
    found = train_sae([capture], options(architecture), tmp_path / "work", name="p", held_out=0.1)
    assert found.sae.card.model == "planted"
    assert (found.sae.layer, found.sae.site) == (2, "resid_post")
    assert found.sae.architecture == {"batchtopk": "jumprelu"}.get(architecture, architecture)
    fresh, _, _ = planted(2000, 2)
    measured = measure(found.sae, fresh)
    cosines = functional.normalize(found.sae.W_dec, dim=-1) @ directions.T
    # Thresholds and directions learn together, which takes longer.
    assert float(cosines.max(0).values.mean()) > (0.9 if architecture == "jumprelu" else 0.95)
    assert measured.explained > 0.8
    assert measured.active == pytest.approx(3, rel=0.25)
    torch.testing.assert_close(found.sae.W_dec.norm(dim=-1), torch.ones(64))
    made = found.sae.card.provenance
    assert made["held_out"]["explained"] == pytest.approx(found.measures.explained)
    plot_training(found, tmp_path / "curve.png", title="p")
    assert (tmp_path / "curve.png").stat().st_size > 1000


@pytest.mark.parametrize("architecture", TRAINED)
def test_the_sae_that_runs_is_the_one_that_was_trained(architecture: Trained) -> None:
    """What the network rebuilds, and so what it was trained for, is what the artefact rebuilds."""
    states, _, _ = planted(512, 3)
    units = RowUnits.of(states)
    network = SAENetwork(WIDTH, options(architecture))
    with torch.no_grad():
        network.bias += 0.1
        if architecture == "batchtopk":
            network.least.fill_(0.3)
            pre = network.pre(units.of_states(states))
            wanted = torch.where(pre > 0.3, pre, 0.0) @ network.decoder + network.bias
        else:
            wanted = network(units.of_states(states)).rebuilt
    sae = network.as_sae(units, HookPoint(0), name="x")
    rebuilt = sae.decode(sae.encode(states))
    torch.testing.assert_close(rebuilt, wanted / units.scale + units.mean, rtol=1e-4, atol=1e-4)


class Ended(Exception):
    pass


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu"])
def test_a_training_that_was_ended_goes_on_to_the_bit(
    tmp_path: Path, architecture: Trained
) -> None:
    states, _, _ = planted(2000, 1)
    capture = captured(tmp_path / "states", states)
    chosen = options(architecture, epochs=3.0, dead_after=512)

    def trained(folder: str, progress: Callable[[int], None] | None = None) -> Tensor:
        found = train_sae(
            [capture],
            chosen,
            tmp_path / folder,
            name="p",
            held_out=0.1,
            checkpoint_steps=4,
            progress=progress,
        )
        assert [row[0] for row in found.curve] == list(range(1, len(found.curve) + 1))
        return torch.cat([found.sae.W_enc.flatten(), found.sae.W_dec.flatten(), found.sae.b_dec])

    told: list[int] = []

    def end(count: int) -> None:
        told.append(count)
        if sum(told) == 10:
            raise Ended

    whole = trained("whole")
    with pytest.raises(Ended):
        trained("parts", end)
    told.clear()
    assert torch.equal(trained("parts", told.append), whole)
    assert told[0] == 8
    # Another training does not go on from there.
    torch.manual_seed(0)
    assert (
        Trainer(
            TrainingRows.of([capture], held_out=0.1, seed=0),
            RowUnits.of(states),
            chosen,
        ).restore(tmp_path / "parts" / "training.safetensors", "another")
        is False
    )


def test_dead_latents_come_to_life() -> None:
    """Latents that never win explain something in the end, through the auxiliary loss alone."""
    states, _, _ = planted(4000, 1)
    units = RowUnits.of(states)

    def alive(weight: float) -> int:
        network = SAENetwork(WIDTH, options("topk", aux_weight=weight, aux_k=16))
        with torch.no_grad():
            network.encoder[:32] *= 0.02  # so weak that they are never among the k largest
        optimiser = torch.optim.Adam(network.parameters(), lr=3e-2)
        dead = torch.arange(64) < 32
        fired = torch.zeros(64, dtype=torch.bool)
        for step in range(300):
            x = units.of_states(states[step % 15 * 256 : (step % 15 + 1) * 256])
            passed = network(x)
            optimiser.zero_grad()
            loss_of(network, x, passed, dead).total.backward()
            optimiser.step()
            fired = network.after_step(passed)
        return int(fired[:32].sum())

    assert alive(1.0) > alive(0.0) + 16


def test_labels_teach_the_first_latents(tmp_path: Path) -> None:
    states, _, sizes = planted(8000, 1)
    labels = torch.full((TEXTS, 2), torch.nan)
    shift = torch.zeros(TEXTS, WIDTH)
    generator = torch.Generator().manual_seed(9)
    for text in range(TEXTS):
        if text % 4 < 2:  # the others have no label
            labels[text] = torch.tensor([1.0, 0.0]) if text % 4 == 0 else torch.tensor([0.0, 1.0])
    ways = torch.randn(2, WIDTH, generator=generator)
    shift[0::4], shift[1::4] = ways[0], ways[1]
    number = torch.arange(len(states)) * TEXTS // len(states)
    states = states + shift[number]
    del sizes
    capture = captured(tmp_path / "states", states)
    sae = train_sae(
        [capture],
        options("topk", k=5),
        tmp_path / "work",
        name="g",
        held_out=0.1,
        text_labels=[labels],
    ).sae
    f = sae.encode(states)[:, :2]
    of_first, of_second = number % 4 == 0, number % 4 == 1
    for latent, own, other in ((0, of_first, of_second), (1, of_second, of_first)):
        fires = f[:, latent] > 0
        assert float(fires[own].float().mean()) > 0.9
        assert float(fires[other].float().mean()) < 0.1


def test_batches_go_through_all_rows_in_every_pass(tmp_path: Path) -> None:
    states, _, _ = planted(1000, 1)
    capture = captured(tmp_path, states)
    rows = TrainingRows.of([capture, capture], held_out=0.25, seed=4)
    assert len(rows.trained) == 1500
    assert not set(rows.trained) & set(rows.held_out)
    # Whole texts are held out.
    texts = np.concatenate([capture.texts, capture.texts + TEXTS])
    assert not set(texts[rows.trained]) & set(texts[rows.held_out])
    steps = 1500 // 100
    first, second = (
        np.concatenate([rows.batch(step, 100, 4) for step in range(n * steps, (n + 1) * steps)])
        for n in (0, 1)
    )
    assert sorted(first) == sorted(second) == sorted(rows.trained)
    assert not np.array_equal(first, second)
    numbers = np.array([1999, 3, 1000, 0])
    assert torch.equal(rows.read(numbers), states[[999, 3, 0, 0]])
    assert units_of(rows, 0).mean.shape == (WIDTH,)


def test_too_little_and_mixed_data_are_refused(tmp_path: Path) -> None:
    few = captured(tmp_path / "few", planted(100, 1)[0])
    with pytest.raises(SteerError, match="too few: an SAE wants hundreds of thousands") as caught:
        TrainingRows.of([few], held_out=0.1, seed=0)
    assert caught.value.code == "too_few_rows"
    narrow = captured(tmp_path / "narrow", planted(1000, 1)[0][:, :16].contiguous())
    with pytest.raises(SteerError, match="trained at one point of one model"):
        TrainingRows.of([few, narrow], held_out=0.1, seed=0)


def test_a_few_very_long_states_do_not_outweigh_the_rest(tmp_path: Path) -> None:
    """One state in two hundred is a hundred times as long, as those on which models keep what
    belongs to no word: what is learnt of the others is the same."""
    states, directions, _ = planted(8000, 1)
    states[::200] = 300.0 * functional.normalize(torch.randn(WIDTH), dim=-1)
    capture = captured(tmp_path / "states", states)
    found = train_sae([capture], options("topk"), tmp_path / "work", name="p", held_out=0.1)
    cosines = functional.normalize(found.sae.W_dec, dim=-1) @ directions.T
    assert float(cosines.max(0).values.mean()) > 0.9
    measures = found.measures
    assert measures.outliers == pytest.approx(1 / 200, rel=0.2)
    assert measures.explained > 0.8
    fresh, _, _ = planted(2000, 2)
    assert measure(found.sae, fresh).explained == pytest.approx(measures.explained, abs=0.05)
    assert measure(found.sae, fresh).outliers == 0
    # Of all variance the few have nearly everything.
    everything = (states - states.mean(0)).square().sum(-1)
    assert float(everything[::200].sum() / everything.sum()) > 0.8
