"""Captures of whole data sets: what lies in the shards is what the engine reads, however cut."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from steer.cli.app import app as cli
from steer.engines.base import CaptureRequest
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import FileFormatError, SteerError
from steer.fit.bulk.capturing import BulkReading, capture_to
from steer.fit.bulk.card import CARD, read_card
from steer.fit.bulk.selected import pieces, selected_tokens
from steer.fit.bulk.shards import CapturedStates
from steer.fit.data.texts import Tokens
from steer.model import HookPoint
from steer.spec import Where

POINT, OTHER = HookPoint(1), HookPoint(2, "mlp_out")
TEXTS: list[Tokens] = [tuple(range(30 + n, 36 + 2 * n)) for n in range(13)]


def test_shards_hold_what_the_engine_reads(engine: TransformersEngine, tmp_path: Path) -> None:
    reading = BulkReading((POINT, OTHER), stride=2, skip=1, batch=4, dtype="float32")
    card = capture_to(engine, TEXTS, tmp_path, reading, shard_bytes=4000)
    assert len(card.shards) > 3
    for point in reading.points:
        found = CapturedStates.open(tmp_path, point)
        assert len(found) == card.rows == sum(len(text) // 2 for text in TEXTS)
        every = found.rows(np.arange(len(found)))
        start = 0
        for number, text in enumerate(TEXTS):
            [alone] = engine.capture(CaptureRequest([text], (point,)))
            wanted = alone.states[point][1::2]
            here = slice(start, start + len(wanted))
            torch.testing.assert_close(every[here], wanted, rtol=1e-4, atol=1e-5)
            assert found.texts[here].tolist() == [number] * len(wanted)
            assert [text[n] for n in found.positions[here]] == found.tokens[here].tolist()
            start += len(wanted)
    backwards = np.arange(len(found))[::-1].copy()
    assert torch.equal(found.rows(backwards), every.flip(0))


class Ended(Exception):
    pass


def test_a_capture_that_was_ended_goes_on(engine: TransformersEngine, tmp_path: Path) -> None:
    reading = BulkReading((POINT,), batch=1, dtype="float32")
    whole = capture_to(engine, TEXTS, tmp_path / "whole", reading, shard_bytes=4000)
    told: list[int] = []

    def end(count: int) -> None:
        told.append(count)
        if sum(told) == 7:
            raise Ended

    parts = tmp_path / "parts"
    with pytest.raises(Ended):
        capture_to(engine, TEXTS, parts, reading, shard_bytes=4000, progress=end)
    begun = read_card(parts)
    assert begun is not None
    assert 0 < begun.texts_done <= 7
    assert not begun.whole
    with pytest.raises(SteerError, match=r"of 13 texts are captured: run the capture again"):
        CapturedStates.open(parts)
    told.clear()
    assert (
        capture_to(engine, TEXTS, parts, reading, shard_bytes=4000, progress=told.append) == whole
    )
    assert told[0] == begun.texts_done
    assert sum(told) == len(TEXTS)
    for shard in whole.shards:
        one, other = ((tmp_path / name / shard.file).read_bytes() for name in ("whole", "parts"))
        assert one == other


def test_a_folder_holds_one_capture(engine: TransformersEngine, tmp_path: Path) -> None:
    capture_to(engine, TEXTS, tmp_path, BulkReading((POINT,)))
    with pytest.raises(SteerError, match="holds another capture") as caught:
        capture_to(engine, TEXTS[:-1], tmp_path, BulkReading((POINT,)))
    assert caught.value.code == "other_capture"
    with pytest.raises(FileFormatError, match=r"holds the hook points 1\.resid_post"):
        CapturedStates.open(tmp_path, OTHER)
    (tmp_path / CARD).write_text("{}")
    with pytest.raises(FileFormatError, match="not what a capture writes"):
        CapturedStates.open(tmp_path)
    (tmp_path / CARD).unlink()
    with pytest.raises(FileFormatError, match=r"no capture\.json"):
        CapturedStates.open(tmp_path)


@pytest.mark.parametrize("pooled", ["last", "mean", "max"])
def test_pooled_texts_are_a_row_each(
    engine: TransformersEngine, tmp_path: Path, pooled: str
) -> None:
    reading = BulkReading((POINT,), pooled=pooled, dtype="float32", batch=1)  # type: ignore[arg-type]
    capture_to(engine, TEXTS, tmp_path, reading)
    found = CapturedStates.open(tmp_path)
    assert found.tokens.tolist() == [text[-1] for text in TEXTS]
    for row, text in zip(found.rows(np.arange(len(found))), TEXTS, strict=True):
        [alone] = engine.capture(CaptureRequest([text], (POINT,)))
        states = alone.states[POINT]
        wanted = {"last": states[-1], "mean": states.mean(0), "max": states.amax(0)}[pooled]
        torch.testing.assert_close(row, wanted)


def test_answers_are_read_as_well(engine: TransformersEngine, tmp_path: Path) -> None:
    reading = BulkReading((POINT,), answer_tokens=5, seed=3, dtype="float32")
    capture_to(engine, TEXTS, tmp_path, reading)
    found = CapturedStates.open(tmp_path)
    for number, text in enumerate(TEXTS):
        own = found.tokens[found.texts == number].tolist()
        assert own[: len(text)] == list(text)
        assert len(text) < len(own) <= len(text) + 5


def test_long_texts_are_cut(engine: TransformersEngine) -> None:
    texts, owners = pieces(engine, ["abcdefgh", "ab", "abcdefghi"], 5)
    assert owners == [0, 0, 1, 2, 2]
    joined = [sum((t for t, o in zip(texts, owners, strict=True) if o == n), ()) for n in range(3)]
    whole, _ = pieces(engine, ["abcdefgh", "ab", "abcdefghi"])
    assert joined == whole
    # A last piece of one token says nothing.
    cut, _ = pieces(engine, ["abcdefgh"], len(whole[0]) - 1)
    assert cut == [whole[0][:-1]]


def test_the_command_writes_what_python_reads(tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(f'"Where does the {word} live?"' for word in ("wolf", "owl")))
    folder = tmp_path / "states"
    command = ["capture", str(texts), str(folder), "--layers", "1,3", "--chat", "--skip", "1"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    found = CapturedStates.open(folder, HookPoint(3))
    assert f"{len(found)} rows of 2 texts" in done.output
    assert set(found.texts) == {0, 1}
    assert found.positions.min() == 1
    refused = CliRunner().invoke(cli, [*command, "--context", "8", "--answer-tokens", "4"])
    assert refused.exit_code == 2
    assert "invalid_option, at /context" in refused.output
    refused = CliRunner().invoke(cli, [*command, "--stride", "2"])
    assert refused.exit_code == 2
    assert "other_capture, at /stride" in refused.output


def test_the_command_steers_and_reads_several_sites(tmp_path: Path) -> None:
    texts, spec = tmp_path / "texts.jsonl", tmp_path / "spec.json"
    texts.write_text('{"tokens": [5, 6, 7]}\n{"positive": "one two", "negative": "three"}\n')
    item = {"kind": "ablate", "vector": "casual", "layers": [2]}
    spec.write_text(json.dumps({"interventions": [item]}))
    points = "2.resid_post, 3.mlp_out"
    found = {}
    for name, options in (("plain", []), ("steered", ["--spec", str(spec)])):
        folder = tmp_path / name
        command = ["capture", str(texts), str(folder), "--points", points, *options]
        done = CliRunner().invoke(cli, [*command, "--registry", str(tmp_path / "registry")])
        assert done.exit_code == 0, done.output
        found[name] = CapturedStates.open(folder, HookPoint(2))
        CapturedStates.open(folder, HookPoint(3, "mlp_out"))
    plain, steered = found.values()
    assert plain.items.tolist() == [0, 1, 1]
    assert plain.tokens[:3].tolist() == [5, 6, 7]
    assert (plain.card.steering, steered.card.steering is None) == (None, False)
    moved = steered.rows(np.arange(len(steered))) - plain.rows(np.arange(len(plain)))
    assert float(moved.norm()) > 0.1
    command = ["capture", str(texts), str(tmp_path / "none"), "--points"]
    for said, why in (("x", "is no hook point"), ("1.up", "is not a site"), ("99", "out of range")):
        refused = CliRunner().invoke(cli, [*command, said])
        assert refused.exit_code == 2
        assert why in " ".join(refused.output.split())


def test_only_selected_tokens_are_kept(engine: TransformersEngine, tmp_path: Path) -> None:
    prompts = [[{"role": "user", "content": f"{n} is it?"}] for n in range(5)]
    texts, _ = pieces(engine, prompts)
    every = BulkReading((POINT,), answer_tokens=4, seed=3, dtype="float32")
    capture_to(engine, texts, tmp_path / "all", every)
    where = Where.model_validate({"after": ["is"], "phases": ["prompt"]})
    chosen = selected_tokens(engine, prompts, where, answered=True)
    card = capture_to(engine, texts, tmp_path / "some", every, selected=chosen)
    assert card.where == where
    read = read_card(tmp_path / "some")
    assert read == card
    whole, some = (CapturedStates.open(tmp_path / name) for name in ("all", "some"))
    # The marks are of ASCII, where a token is a byte.
    places = [
        row
        for row, (n, place) in enumerate(zip(whole.texts, whole.positions, strict=True))
        if (end := bytes(t for t in texts[n] if t < 256).index(b"is"))
        and len(texts[n]) > place >= end + 2 + sum(t > 255 for t in texts[n][: end + 2])
    ]
    assert len(some) == len(places)
    assert some.positions.tolist() == whole.positions[places].tolist()
    assert torch.equal(some.rows(np.arange(len(some))), whole.rows(np.array(places)))
    generated = Where.model_validate({"phases": ["generation"], "roles": ["assistant"]})
    chosen = selected_tokens(engine, prompts, generated, answered=True)
    capture_to(engine, texts, tmp_path / "said", every, selected=chosen)
    said = CapturedStates.open(tmp_path / "said")
    answers = [p >= len(texts[n]) for n, p in zip(whole.texts, whole.positions, strict=True)]
    assert torch.equal(said.rows(np.arange(len(said))), whole.rows(np.flatnonzero(answers)))
    with pytest.raises(SteerError, match="holds another capture"):
        capture_to(engine, texts, tmp_path / "said", every)


def test_a_selection_of_nothing_is_refused(engine: TransformersEngine, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('"one"\n"two"\n')
    command = ["capture", str(texts), str(tmp_path / "states"), "--layers", "1", "--where"]
    for said, why in (('{"after": ["three"]}', "selects none"), ("everywhere", "no selection")):
        done = CliRunner().invoke(cli, [*command, said])
        assert done.exit_code != 0
        assert why in " ".join(done.output.split())
    prompts = [[{"role": "user", "content": "one"}]]
    where = Where.model_validate({"phases": ["generation"], "positions": [[900, None]]})
    chosen = selected_tokens(engine, prompts, where, answered=True)
    cut, _ = pieces(engine, prompts)
    with pytest.raises(SteerError) as caught:
        capture_to(
            engine, cut, tmp_path / "said", BulkReading((POINT,), answer_tokens=2), selected=chosen
        )
    assert caught.value.code == "nothing_selected"
