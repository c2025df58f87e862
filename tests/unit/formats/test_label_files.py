"""Labels of features from foreign files: Neuronpedia's export, and plain JSON."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from steer.errors import SteerError
from steer.formats.labels.reading import read_label_files, read_label_text

SOURCE = "20-gemmascope-res-16k"


def explanation(index: Any, text: str, source: str = SOURCE) -> dict[str, Any]:
    return {
        "modelId": "gemma-2-2b",
        "layer": source,
        "index": index,
        "description": text,
        "typeName": "oai_token-act-pair",
        "explanationModelName": "m",
        "embedding": None,
    }


def written(path: Path, rows: list[Any], *, packed: bool = False) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    return path


def test_an_export_in_batches_and_kinds_makes_one_label_a_feature(tmp_path: Path) -> None:
    place = {"modelId": "gemma-2-2b", "layer": SOURCE}
    files = [
        written(
            tmp_path / "batch-1.jsonl.gz",
            [explanation("7", " French words "), explanation(3, "food"), explanation(3, "later")],
            packed=True,
        ),
        written(tmp_path / "batch-0.jsonl", [explanation(5, "")]),
        written(
            tmp_path / "features.jsonl",
            [
                {
                    **place,
                    "index": "7",
                    "frac_nonzero": 0.02,
                    "maxActApprox": 31.5,
                    "pos_str": ["le"],
                }
            ],
        ),
        written(
            tmp_path / "activations.jsonl",
            [
                {
                    **place,
                    "index": "5",
                    "tokens": ["a", " cat"],
                    "values": [0, 2],
                    "maxValueTokenIndex": 1,
                },
                {**place, "index": "5", "tokens": ["b"], "values": [1], "maxValueTokenIndex": 9},
            ],
        ),
    ]
    found = read_label_files(files)
    assert (found.layout, found.sources) == ("neuronpedia", (SOURCE,))
    assert list(found.labels) == [3, 5, 7]
    assert found.labels[3].text == "food"
    assert found.labels[5].tokens == (" cat",)
    french = found.labels[7]
    assert (french.text, french.density, french.largest) == ("French words", 0.02, 31.5)
    assert french.tokens == ("le",)
    found.check(8, 20)


@pytest.mark.parametrize(
    "text",
    [
        '{"5": "five", "6": {"text": "six", "auroc": 0.5}}',
        '{\n "5": "five",\n "6": {"text": "six", "auroc": 0.5}\n}',
        '{"5": "five"}\n\n{"6": {"text": "six", "auroc": 0.5}}\n',
        '{"feature": 5, "text": "five"}\n{"feature": 6, "text": "six", "auroc": 0.5}',
        '[{"5": "five"}, {"feature": "6", "text": "six", "auroc": 0.5}]',
    ],
)
def test_plain_labels_in_every_spelling(text: str) -> None:
    found = read_label_text(text)
    assert found.layout == "plain"
    assert {n: one.text for n, one in found.labels.items()} == {5: "five", 6: "six"}
    assert found.labels[6].auroc == 0.5


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("", "no_labels", "holds no labels"),
        ("{}", "no_labels", "holds no labels"),
        ("{", "invalid_labels", "line 1"),
        ('{"1": "a"}\n{"2"', "invalid_labels", "line 2"),
        ('{"one": "a"}', "invalid_labels", "'one'"),
        ('{"-1": "a"}', "invalid_labels", "'-1'"),
        ('{"1": 5}', "invalid_labels", "a label is a text"),
        ('{"1": {"text": "a", "colour": "red"}}', "invalid_labels", "colour"),
        ('"a"', "invalid_labels", "labels are an object"),
        ('{"feature": true, "text": "a"}', "invalid_labels", "'True'"),
        (json.dumps(explanation(-1, "a")), "invalid_labels", "'index'"),
        (json.dumps({**explanation(1, "a"), "description": 7}), "invalid_labels", "description"),
    ],
)
def test_what_are_no_labels_is_named(text: str, code: str, said: str) -> None:
    with pytest.raises(SteerError, match=said) as raised:
        read_label_text(text)
    assert raised.value.code == code


@pytest.mark.parametrize("kept", [1, 12, -1])
def test_a_damaged_gzip_file_is_named(tmp_path: Path, kept: int) -> None:
    path = written(tmp_path / "batch.jsonl.gz", [explanation(1, "x")] * 50, packed=True)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(SteerError, match="batch") as raised:
        read_label_files([path])
    assert raised.value.code == "invalid_labels"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SteerError) as raised:
        read_label_files([tmp_path / "none.jsonl"])
    assert raised.value.code == "no_such_file"


@pytest.mark.parametrize(
    ("rows", "d_sae", "layer", "said"),
    [
        ([explanation(1, "a")], 8, 19, "begins with '19-'"),
        ([explanation(8, "a")], 8, 20, "features 0 to 7"),
        ([explanation(1, "a"), explanation(1, "b", "20-other-16k")], 8, 20, "several SAEs"),
    ],
)
def test_labels_of_another_sae_are_refused(
    rows: list[Any], d_sae: int, layer: int, said: str
) -> None:
    read = read_label_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SteerError, match=said) as raised:
        read.check(d_sae, layer)
    assert raised.value.code == "wrong_labels"
