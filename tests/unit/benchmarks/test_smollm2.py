"""What the benchmark on a real model says of answers, rounds and files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize

from benchmarks.smollm2.agreement import Agreement, agreement
from benchmarks.smollm2.full_precision import dequantised
from benchmarks.smollm2.programs import Row
from benchmarks.smollm2.record import Record

TEXTS = {1: "I", 2: " am", 3: " a", 4: " bo", 5: "at", 9: "<end>"}
REFERENCE = [1, 2, 3, 4, 5]


def decode(tokens: list[int]) -> str:
    return "".join(TEXTS[token] for token in tokens)


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [
        (REFERENCE, 5),
        ([1, 2, 9, 4, 5], 2),
        ([9, 2, 3, 4, 5], 0),
        ("I am a boat", 5),
        ("I am a bone", 4),
        ("Who am I", 0),
        ("I am", 2),
    ],
)
def test_tokens_count_up_to_the_first_that_differs(answer: list[int] | str, tokens: int) -> None:
    found = agreement([REFERENCE], [answer], decode, ends=[])
    assert found == Agreement(tokens, 5, int(tokens == 5), 1)


def test_nothing_is_compared_behind_the_references_end() -> None:
    found = agreement([[1, 2, 9, 3], [1, 2, 3, 4]], ["I am a", "I am a"], decode, ends=[9])
    assert found == Agreement(2 + 3, 2 + 4, 1, 2)


def row(title: str, base: str | None = None) -> Row:
    return Row(title, "unsteered", "not", base, "float32", exact=True)


def record(path: Path, **settings: int) -> Record:
    return Record.of(path, settings, {"cpu": "one"}, fresh=False)


def test_a_run_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "bench.json"
    first = record(path, chats=4)
    first.rounds.append({"plain": 10.0})
    first.missing["gone"] = "failed"
    first.write(path)
    assert record(path, chats=4).rounds == [{"plain": 10.0}]
    assert record(path, chats=4).missing == {}, "what was missing may have been installed"
    assert record(path, chats=8).rounds == []
    assert Record.of(path, {"chats": 4}, {"cpu": "two"}, fresh=False).rounds == []
    assert Record.of(path, {"chats": 4}, {"cpu": "one"}, fresh=True).rounds == []


def test_ratios_are_of_rounds_in_which_both_ran(tmp_path: Path) -> None:
    found = record(tmp_path / "none.json")
    found.rounds = [{"plain": 100.0, "ours": 50.0}, {"plain": 10.0}, {"plain": 80.0, "ours": 40.0}]
    found.missing["ours"] = "failed: it fell over"
    found.check("ours", Agreement(9, 10, 0, 1))
    found.check("ours", Agreement(8, 10, 0, 1))
    found.check("ours", Agreement(10, 10, 1, 1))
    *_, line = found.table([row("plain"), row("ours", "plain")]).splitlines()
    assert "0.50 × [0.50, 0.50]" in line
    assert "failed: it fell over" in line
    assert "8 of 10 (0 of 1 answers)" in line, "the worst round counts"


def test_a_quantised_file_in_float32_holds_the_same_numbers(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    packed = quantize(weights, GGMLQuantizationType.Q4_1)
    source, target = tmp_path / "q4.gguf", tmp_path / "f32.gguf"
    writer = GGUFWriter(source, "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("blk.0.attn_q.weight", packed, raw_dtype=GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    reader = GGUFReader(dequantised(source, target))
    (tensor,) = reader.tensors
    assert tensor.tensor_type == GGMLQuantizationType.F32
    assert np.array_equal(tensor.data, dequantize(packed, GGMLQuantizationType.Q4_1))
    kept = {key: field.contents() for key, field in reader.fields.items()}
    assert kept["general.architecture"] == "llama"
    assert kept["llama.block_count"] == 1
    assert kept["general.file_type"] == LlamaFileType.ALL_F32
    assert kept["tokenizer.ggml.tokens"] == ["a", "b"]
