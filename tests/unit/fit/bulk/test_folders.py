"""Folders of captures: what was begun goes on to the byte or not at all, and what lies is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import byte_model

from steer.engines.fake.engine import ByteTokenizer
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import FileFormatError, SteerError, TooLarge
from steer.fit.bulk.capturing import BulkReading, CaptureLimits, capture_to
from steer.fit.bulk.card import CARD, CaptureCard, read_card
from steer.fit.bulk.shards import CapturedStates, text_digest
from steer.fit.data.texts import Tokens
from steer.model import HookPoint

POINT = HookPoint(1)
TEXTS: list[Tokens] = [tuple(range(30 + n, 36 + 2 * n)) for n in range(13)]
ANSWERED = BulkReading((POINT,), answer_tokens=3, seed=3, batch=4, dtype="float32")
SHARD = 4000


class Ended(Exception):
    pass


def ended_after(texts: int) -> Callable[[int], None]:
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        if done >= texts:
            raise Ended

    return count


def files(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in folder.iterdir() if one.suffix != ".lock"}


@pytest.fixture(scope="module")
def whole(engine: TransformersEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    capture_to(engine, TEXTS, folder, ANSWERED, shard_bytes=SHARD)
    return folder


@pytest.mark.parametrize("texts", range(1, len(TEXTS) + 1))
def test_wherever_it_was_ended_the_files_are_the_same(
    engine: TransformersEngine, whole: Path, tmp_path: Path, texts: int
) -> None:
    """Also in the middle of a batch: neighbours may round a state otherwise."""
    with pytest.raises(Ended):
        capture_to(
            engine, TEXTS, tmp_path, ANSWERED, shard_bytes=SHARD, progress=ended_after(texts)
        )
    capture_to(engine, TEXTS, tmp_path, ANSWERED, shard_bytes=SHARD)
    assert files(tmp_path) == files(whole)


def test_a_shard_that_was_cut_off_is_read_again(
    engine: TransformersEngine, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    cut = tmp_path / "states-00001.safetensors"
    cut.write_bytes(cut.read_bytes()[:-9])
    (tmp_path / "states-00002.safetensors").unlink()
    capture_to(engine, TEXTS, tmp_path, ANSWERED, shard_bytes=SHARD)
    assert files(tmp_path) == files(whole)


@pytest.mark.parametrize(
    ("change", "said", "param"),
    [
        ({"stride": 2}, "'stride' is 1 there, and 2 is asked for", "/stride"),
        ({"skip": 1}, "'skip' is 0 there, and 1", "/skip"),
        ({"pooled": "mean"}, "'pooled' is 'none' there, and 'mean'", "/pooled"),
        ({"dtype": "bfloat16"}, "'dtype' is 'float32' there", "/stored"),
        ({"seed": 4}, "'seed' is 3 there, and 4", "/seed"),
        ({"temperature": 0.5}, "'temperature' is 1.0 there, and 0.5", "/temperature"),
        ({"answer_tokens": 2}, "'answer_tokens' is 3 there", "/answer_tokens"),
        (
            {"points": (POINT, HookPoint(0, "mlp_out"))},
            "'points' is 1.resid_post there, and 1.resid_post, 0.mlp_out",
            "/points",
        ),
    ],
)
def test_another_capture_is_refused_by_the_setting(
    engine: TransformersEngine, whole: Path, change: dict[str, Any], said: str, param: str
) -> None:
    reading = BulkReading(**(vars(ANSWERED) | change))
    with pytest.raises(SteerError) as caught:
        capture_to(engine, TEXTS, whole, reading)
    assert caught.value.code == "other_capture"
    assert said in caught.value.message
    assert caught.value.param == param


def test_other_texts_and_other_models_are_refused(
    engine: TransformersEngine, lively: TransformersEngine, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(SteerError, match="'texts' is 13 there, and 12") as caught:
        capture_to(engine, TEXTS[1:], whole, ANSWERED)
    assert caught.value.param == "/prompts"
    with pytest.raises(SteerError, match="'texts_sha256' is"):
        capture_to(engine, [*TEXTS[1:], TEXTS[0]], whole, ANSWERED)
    with pytest.raises(SteerError, match=r"'info' is tiny in .* and lively in") as caught:
        capture_to(lively, TEXTS, whole, ANSWERED)
    assert caught.value.param is None
    # Of the same name and shape, and other weights.
    with pytest.raises(Ended):
        capture_to(engine, TEXTS, tmp_path, ANSWERED, shard_bytes=SHARD, progress=ended_after(8))
    model = byte_model(initializer_range=0.2)
    with (
        TransformersEngine(model, ByteTokenizer(), name="tiny", rows=8, slots=16) as other,
        pytest.raises(SteerError, match="its weights are others") as caught,
    ):
        capture_to(other, TEXTS, tmp_path, ANSWERED, shard_bytes=SHARD)
    assert caught.value.code == "other_capture"


def test_neither_batches_nor_shards_are_in_the_result(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    found = []
    for n, (batch, size) in enumerate(((1, 1), (3, 4000), (13, 1 << 20))):
        reading = BulkReading((POINT,), batch=batch, dtype="float32", stride=2)
        capture_to(engine, TEXTS, tmp_path / str(n), reading, shard_bytes=size)
        found.append(CapturedStates.open(tmp_path / str(n)))
    assert [len(one.card.shards) for one in found] == [13, 3, 1]
    every = [one.rows(np.arange(len(one))) for one in found]
    for one, rows in zip(found[1:], every[1:], strict=True):
        assert one.positions.tolist() == found[0].positions.tolist()
        torch.testing.assert_close(rows, every[0], rtol=1e-5, atol=1e-5)


def test_rows_come_in_batches(whole: Path) -> None:
    found = CapturedStates.open(whole, verify=True)
    every = found.rows(np.arange(len(found)))
    straight = list(found.batches(7))
    assert [len(one.states) for one in straight][:-1] == [7] * (len(found) // 7)
    assert torch.equal(torch.cat([one.states for one in straight]), every)
    orders = {}
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        parts = list(found.batches(7, seed=seed, epoch=epoch))
        numbers = np.concatenate([one.numbers for one in parts])
        assert sorted(numbers) == list(range(len(found)))
        assert torch.equal(torch.cat([one.states for one in parts]), every[numbers])
        for name in ("tokens", "texts", "positions", "generated"):
            joined = np.concatenate([getattr(one, name) for one in parts])
            assert joined.tolist() == getattr(found, name)[numbers].tolist()
        again = [one.numbers.tolist() for one in found.batches(7, seed=seed, epoch=epoch)]
        assert again == [one.numbers.tolist() for one in parts]
        orders[seed, epoch] = numbers.tolist()
    assert len({tuple(one) for one in orders.values()}) == 3
    with pytest.raises(SteerError, match="at least 1"):
        list(found.batches(0))


def test_what_the_model_said_is_marked(whole: Path) -> None:
    found = CapturedStates.open(whole)
    own = np.array([len(TEXTS[n]) for n in found.texts])
    assert (found.generated == (found.positions >= own)).all()
    assert found.generated.any()
    for n, digest in enumerate(found.digests):
        tokens = found.tokens[slice(*found.text_starts[n : n + 2])].tolist()
        assert (len(tokens), text_digest(tokens)) == (found.lengths[n], digest.tobytes())


def test_files_that_are_not_what_the_card_says_are_told(whole: Path, tmp_path: Path) -> None:
    def damaged(change: Callable[[Path], None], message: str, **options: Any) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(whole, folder)
        change(folder)
        with pytest.raises(FileFormatError, match=message) as caught:
            CapturedStates.open(folder, **options)
        assert caught.value.code == "damaged_capture"

    def cut(folder: Path) -> None:
        path = folder / "states-00000.safetensors"
        path.write_bytes(path.read_bytes()[:-1])

    damaged(cut, r"states-00000.* has \d+ bytes, and capture.json says")

    def flipped(folder: Path) -> None:
        path = folder / "states-00001.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    damaged(flipped, "its sha256 is", verify=True)

    def rewritten(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
        """A file of the size that the card says, with something else in it."""

        def write(folder: Path) -> None:
            path = folder / "states-00001.safetensors"
            arrays = load_file(path)
            change(arrays)
            save_file(arrays, path)
            card = json.loads((folder / CARD).read_text())
            card["shards"][1]["bytes"] = path.stat().st_size
            (folder / CARD).write_text(json.dumps(card))

        return write

    key = str(POINT)
    damaged(rewritten(lambda a: a.pop(key) is None), "'1.resid_post' is nothing")
    damaged(rewritten(lambda a: a.update({key: a[key][:, 1:].clone()})), "'1.resid_post' is")
    damaged(rewritten(lambda a: a.update({key: a[key].double()})), "float64")
    damaged(rewritten(lambda a: a["text"].add_(40)), "not of the texts")
    damaged(rewritten(lambda a: a.update(text=a["text"].flip(0))), "not of the texts")
    damaged(rewritten(lambda a: a.update(digest=a["digest"][:, 1:].clone())), "'digest'")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"file": "../../secret.safetensors"}, "shards.0.file"),
        ({"rows": -1}, "shards.0.rows"),
        ({"sha256": "none"}, "shards.0.sha256"),
        ({"more": 1}, "shards.0.more"),
    ],
)
def test_a_card_cannot_lead_astray(
    whole: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    card = json.loads((whole / CARD).read_text())
    card["shards"][0] |= change
    (tmp_path / CARD).write_text(json.dumps(card))
    with pytest.raises(FileFormatError, match=said) as caught:
        CapturedStates.open(tmp_path)
    assert caught.value.code == "invalid_capture"


def test_the_card_says_what_model_it_was(engine: TransformersEngine, whole: Path) -> None:
    card = read_card(whole)
    assert isinstance(card, CaptureCard)
    assert card.info == engine.info
    assert (card.model, card.engine) == ("tiny", "transformers")
    assert card.bytes == sum(len(data) for name, data in files(whole).items() if name != CARD)


def test_more_than_is_allowed_is_not_written(engine: TransformersEngine, tmp_path: Path) -> None:
    reading = BulkReading((POINT,), dtype="float32", stride=3)
    rows = sum(-(-len(text) // 3) for text in TEXTS)
    for limits in (CaptureLimits(rows=rows - 1), CaptureLimits(bytes=rows * 32 * 4 - 1)):
        with pytest.raises(TooLarge, match="are left to it") as caught:
            capture_to(engine, TEXTS, tmp_path / "none", reading, limits=limits)
        assert caught.value.code == "capture_too_large"
    assert not (tmp_path / "none").exists()
    card = capture_to(
        engine, TEXTS, tmp_path, reading, limits=CaptureLimits(rows=rows, bytes=rows * 32 * 4)
    )
    assert card.rows == rows
    # Of answers it is known as they come.
    known = sum(map(len, TEXTS))
    with pytest.raises(TooLarge):
        capture_to(engine, TEXTS, tmp_path / "said", ANSWERED, limits=CaptureLimits(rows=known + 4))


def test_what_no_row_can_hold_is_refused(engine: TransformersEngine, tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="the token 999 of text 1 is not in the vocabulary"):
        capture_to(engine, [TEXTS[0], (5, 999)], tmp_path, ANSWERED)
    model = byte_model(initializer_range=0.2)
    model.get_input_embeddings().weight.data *= 1e6
    reading = BulkReading((POINT,), dtype="float16")
    with (
        TransformersEngine(model, ByteTokenizer(), name="large", rows=8, slots=16) as large,
        pytest.raises(SteerError, match="which float16 cannot hold: keep them in") as caught,
    ):
        capture_to(large, TEXTS, tmp_path, reading)
    assert (caught.value.code, caught.value.param) == ("not_finite", "/stored")
