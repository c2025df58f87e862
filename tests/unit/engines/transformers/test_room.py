"""A request is admitted where there is room for all that it may generate, and waits where not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import byte_model
from transformers import DynamicCache

from steer.engines.base import GenerationRequest, SamplingParams
from steer.engines.fake.engine import ByteTokenizer
from steer.engines.listeners import Item
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.transformers.room import SLACK, CacheRoom, _left_of_limit, token_bytes
from steer.engines.transformers.sequences import BatchSequence
from steer.errors import SteerError


def test_rows_are_as_wide_as_the_longest_and_caches_of_their_own_are_not() -> None:
    room = CacheRoom(1000)
    assert room.padded([100] * 4)
    assert not room.padded([100] * 5)
    assert not room.padded([100, 100, 100, 200])
    assert room.apart([100, 100, 100, 700])
    assert not room.apart([100, 100, 100, 701])
    assert room.widest == 1000 - 125
    assert CacheRoom(1 << 20).slack == SLACK


def test_a_token_takes_its_keys_and_values_in_every_layer() -> None:
    cache = DynamicCache()
    for layer in range(3):
        states = torch.zeros(1, 2, 5, 8, dtype=torch.float16)
        cache.update(states, states, layer)
    assert token_bytes(cache, 5) == 3 * 2 * 2 * 8 * 2
    assert token_bytes(object(), 5) == 0


def test_there_is_least_room_where_memory_is_full_and_no_bound_where_tokens_take_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("steer.engines.transformers.room.free_bytes", lambda device: 1000)
    cpu = torch.device("cpu")
    assert CacheRoom.on(cpu, 4, least=10).tokens == 100
    assert CacheRoom.on(cpu, 400, least=10).tokens == 10
    assert CacheRoom.on(cpu, 0, least=10) == CacheRoom()


@pytest.mark.parametrize(
    ("limit", "left"), [("max", None), ("1000", 1000 - 900 + 300), ("500", 0), ("?", None)]
)
@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_counts(
    tmp_path: Path, limit: str, left: int | None, version: int
) -> None:
    """Pages of files can be dropped, those that were read lately as well."""
    group(tmp_path, version, limit=limit, used=900)
    assert _left_of_limit(tmp_path, tmp_path / "said") == left
    assert _left_of_limit(tmp_path / "none", tmp_path / "said") is None


@pytest.mark.parametrize(
    ("version", "said"), [(1, "5:cpu:/other\n4:memory:/jobs/one\n"), (2, "0::/jobs/one\n")]
)
def test_the_tightest_limit_above_this_process_counts(
    tmp_path: Path, version: int, said: str
) -> None:
    (tmp_path / "said").write_text(said)
    for path, limit in (("jobs", "2000"), ("jobs/one", "5000"), ("jobs/two", "10")):
        group(tmp_path, version, path, limit=limit, used=900)
    assert _left_of_limit(tmp_path, tmp_path / "said") == 2000 - 600


def group(root: Path, version: int, path: str = "", *, limit: str, used: int) -> None:
    """A control group whose pages of files are 300 bytes."""
    folder = (root if version == 2 else root / "memory") / path
    folder.mkdir(parents=True, exist_ok=True)
    limited, counted, prefix = (
        ("memory.max", "memory.current", "")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    )
    (folder / limited).write_text(limit + "\n")
    (folder / counted).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"anon 600\n{prefix}active_file 100\n{prefix}inactive_file 200\n"
    )


def requests(count: int, *, prompt: int, tokens: int) -> list[GenerationRequest]:
    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=1)
    return [
        GenerationRequest(str(n), tuple((7 * n + k) % 200 + 1 for k in range(prompt)), sampling)
        for n in range(count)
    ]


@pytest.mark.parametrize(
    ("batching", "tokens", "most"), [("rolling", 200, 2), ("alone", 3 * 60, 3)]
)
def test_who_finds_no_room_waits_and_says_the_same(
    batching: Any, tokens: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight come at once, long and short; the cache has room for two or three of the long ones."""
    asked = requests(4, prompt=40, tokens=20) + requests(4, prompt=9, tokens=4)
    with TransformersEngine(byte_model(), ByteTokenizer(), batching=batching) as engine:
        wanted = engine.complete(asked)
    options = {"batching": batching, "cache_tokens": tokens}
    with TransformersEngine(byte_model(), ByteTokenizer(), **options) as engine:
        decode, seen = engine._batch.decode, list[int]()

        def step() -> list[tuple[BatchSequence, Item]]:
            lengths = [sequence.longest for sequence in engine._batch.sequences]
            seen.append(len(lengths))
            assert engine._batch.fits([])
            return decode()

        monkeypatch.setattr(engine._batch, "decode", step)
        found = engine.complete(asked)
    assert most <= max(seen) < len(asked)
    for mine, other in zip(found, wanted, strict=True):
        assert mine.tokens == other.tokens
        assert mine.finish == other.finish


def test_what_can_never_fit_is_refused_with_how_much_can() -> None:
    options = {"cache_tokens": 57}
    with TransformersEngine(byte_model(), ByteTokenizer(), **options) as engine:
        [too_long] = requests(1, prompt=60, tokens=4)
        with pytest.raises(SteerError, match="60 tokens and there is memory for 50 here"):
            engine.complete([too_long])
        [cut] = engine.complete(requests(1, prompt=40, tokens=30))
    assert (len(cut.tokens), cut.finish) == (10, "length")


def test_buffers_stay_within_the_room_however_rows_come_and_go() -> None:
    options = {"rows": 16, "cache_tokens": 8 * (40 + SLACK)}
    with TransformersEngine(byte_model(), ByteTokenizer(), **options) as engine:
        decode, held = engine._batch.decode, list[int]()

        def step() -> list[tuple[BatchSequence, Item]]:
            items = decode()
            for layer in engine._batch._cache.cache.layers:
                held.append(layer.keys.shape[0] * layer.keys.shape[2])
            return items

        engine._batch.decode = step  # type: ignore[method-assign]
        engine.complete(requests(12, prompt=30, tokens=10) + requests(12, prompt=3, tokens=37))
    assert held
    assert max(held) <= options["cache_tokens"]
