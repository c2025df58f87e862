"""Labelled texts, relation tables and exercises, from files."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steer.errors import FileFormatError, SteerError
from steer.fit.data.exercises import Exercise, ExerciseSet, read_exercises
from steer.fit.data.jsonl import LineReader
from steer.fit.data.labels import Labelled, LabelledSet, parse_labelled, read_labelled
from steer.fit.data.pairs import Pair, read_pairs, read_prompts
from steer.fit.data.prompt import Marked
from steer.fit.data.relations import Fact, RelationTable, Template, read_relations

CHAT = [{"role": "user", "content": "hi"}]
GOOD = {
    read_labelled: '{"text": "a", "label": "b"}\n',
    read_relations: '{"subject": "a", "relation": "b", "object": "c"}\n',
    read_exercises: '{"prompt": "a", "answer": "b"}\n',
}


def written(folder: Path, *values: Any) -> Path:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values), "utf-8")
    return file


def test_labelled_texts_have_many_classes(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        {"text": "x", "label": "red"},
        {"messages": CHAT, "label": 3},
        {"prompt": {"prompt": "q", "response": "r"}, "label": True},
    )
    found = read_labelled(file)
    assert found.items == (
        Labelled("x", "red"),
        Labelled(CHAT, "3"),
        Labelled(Marked("q", response="r"), "true"),
    )
    assert found.labels == ("3", "red", "true")
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_sets_in_memory_have_the_hash_of_their_file(tmp_path: Path) -> None:
    facts = [Fact("Frankreich", "Hauptstadt", "Köln"), Fact("a", "b", "c")]
    assert read_relations(
        written(
            tmp_path,
            *({"subject": f.subject, "relation": f.relation, "object": f.object} for f in facts),
        )
    ) == RelationTable.of(facts)
    items = [Exercise("a", "b"), Exercise(CHAT, "é")]
    assert read_exercises(
        written(tmp_path, *({"prompt": one.prompt, "answer": one.answer} for one in items))
    ) == ExerciseSet.of(items)
    labelled = [Labelled("a", "b")]
    assert read_labelled(written(tmp_path, {"prompt": "a", "label": "b"})) == LabelledSet.of(
        labelled
    )


@pytest.mark.parametrize(
    ("read", "line"),
    [
        (read_labelled, '{"text": "a"}'),
        (read_labelled, '{"text": "a", "messages": [], "label": "b"}'),
        (read_labelled, '{"text": "a", "label": 1.5}'),
        (read_labelled, '{"text": "a", "label": ""}'),
        (read_labelled, '{"messages": [{"role": "user"}], "label": "b"}'),
        (read_labelled, "[1]"),
        (read_relations, '{"subject": "a", "relation": "b"}'),
        (read_relations, '{"subject": "a", "relation": "b", "object": ""}'),
        (read_relations, '{"subject": "a", "relation": 1, "object": "c"}'),
        (read_relations, "nonsense"),
        (read_exercises, '{"prompt": "a", "answer": ""}'),
        (read_exercises, '{"prompt": "", "answer": "b"}'),
        (read_exercises, '{"prompt": "a", "completion": "b"}'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, read: Callable[[Path], Any], line: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(GOOD[read] + line)
    with pytest.raises(FileFormatError, match="line 2"):
        read(file)


def test_a_separator_of_lines_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    file = written(tmp_path, {"positive": "a\u2028b", "negative": "c\x85d"})
    assert read_pairs(file).items == (Pair("a\u2028b", "c\x85d"),)


def test_lines_are_read_one_at_a_time(tmp_path: Path) -> None:
    """The bad line is reported before those behind it are read."""
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"a": 1}\n{\n\xff\xff\n')
    seen: list[Any] = []
    with pytest.raises(FileFormatError, match="line 2: not JSON"):
        LineReader(file, "thing", "{}", "invalid").read(lambda value, at: seen.append((value, at)))
    assert seen == [({"a": 1}, f"{file}, line 1")]


FACTS = [Fact(s, "capital", o) for s, o in (("A", "a"), ("B", "b"), ("C", "c"), ("D", "d"))]


def test_a_template_asks_after_solved_examples() -> None:
    text = Template("The capital of {subject}", "is", shots=2)
    prompt = text.ask(FACTS[0], FACTS, seed=0)
    *solved, last = str(prompt.prompt).split("\n")
    assert last == "The capital of A"
    assert (prompt.response, prompt.subject) == (" is", "A")
    assert len(solved) == 2
    assert set(solved) <= {f"The capital of {f.subject} is {f.object}" for f in FACTS[1:]}
    assert text.ask(FACTS[0], FACTS, seed=0) == prompt
    assert len({str(text.ask(FACTS[0], FACTS, seed=n).prompt) for n in range(8)}) > 1


def test_a_chat_template_solves_in_turns() -> None:
    prompt = Template("Capital of {subject}?", "For {subject}:", chat=True, shots=9).ask(
        FACTS[3], FACTS
    )
    assert [m["role"] for m in prompt.prompt[:2]] == ["user", "assistant"]  # type: ignore[index]
    assert len(prompt.prompt) == 7
    assert prompt.prompt[-1] == {"role": "user", "content": "Capital of D?"}
    assert prompt.response == "For D:"
    assert "D" not in str(prompt.prompt[:-1])


def test_what_a_table_cannot_answer_is_refused() -> None:
    with pytest.raises(SteerError, match="the table has capital"):
        RelationTable.of(FACTS).about("currency")
    with pytest.raises(SteerError, match="subject"):
        Template("The capital")
    with pytest.raises(SteerError, match="shots"):
        Template("{subject}", shots=-1)


@pytest.mark.parametrize("read", [*GOOD, read_pairs])
def test_a_byte_order_mark_and_blank_lines_are_no_lines(
    tmp_path: Path, read: Callable[[Path], Any]
) -> None:
    line = GOOD.get(read, '{"positive": "a", "negative": "b"}\n')
    plain, marked = tmp_path / "plain.jsonl", tmp_path / "marked.jsonl"
    plain.write_text(line, "utf-8")
    marked.write_bytes(b"\xef\xbb\xbf" + line.replace("\n", "\r\n\r\n").encode())
    found, expected = read(marked), read(plain)
    assert len(found) == len(expected) == 1
    # The hash is of the file as it lies.
    assert found.sha256 == hashlib.sha256(marked.read_bytes()).hexdigest() != expected.sha256


ROWS = [{"text": "a, b", "label": "1"}, {"text": 'says "c"\n\nand d', "label": "0"}]


def as_csv(delimiter: str, **options: Any) -> str:
    found = io.StringIO()
    writer = csv.DictWriter(found, ["text", "label"], delimiter=delimiter, **options)
    writer.writeheader()
    writer.writerows(ROWS)
    return found.getvalue()


TABLES = {
    "an array": json.dumps(ROWS),
    "an array on many lines": json.dumps(ROWS, indent=2),
    "an array behind blank lines": "\n \n" + json.dumps(ROWS, indent=2) + "\n\n",
    "an object of columns": json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}),
    "an object of columns on many lines": json.dumps(
        {key: [row[key] for row in ROWS] for key in ROWS[0]}, indent=1
    ),
    "an array under a name": json.dumps({"data": ROWS}, indent=2),
    "commas": as_csv(","),
    "tabs": as_csv("\t"),
    "semicolons": as_csv(";"),
    "all in quotation marks": as_csv(",", quoting=csv.QUOTE_ALL),
    "lines end as on Unix": as_csv(",", lineterminator="\n"),
    "with a mark and blank lines": "\ufeff\n" + as_csv(",") + "\n\n",
    "as pandas writes them": ',text,label\n0,"a, b",1\n1,"says ""c""\n\nand d",0\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_arrays_and_tables_are_read_as_the_lines_that_they_would_be(
    tmp_path: Path, name: str
) -> None:
    file = tmp_path / "data"
    file.write_bytes(TABLES[name].encode())
    found = read_labelled(file)
    assert found.items == read_labelled(written(tmp_path, *ROWS)).items
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    sent = parse_labelled(file.read_bytes(), "what was sent")
    assert sent.items == found.items


def test_every_kind_of_data_is_read_from_arrays_and_tables(tmp_path: Path) -> None:
    for read, line in GOOD.items():
        value = json.loads(line)
        expected = read(written(tmp_path, value)).items
        (tmp_path / "array.json").write_text(json.dumps([value], indent=1))
        (tmp_path / "table.csv").write_text(",".join(value) + "\n" + ",".join(value.values()))
        assert read(tmp_path / "array.json").items == expected
        assert read(tmp_path / "table.csv").items == expected


def test_one_item_may_stand_on_many_lines_and_its_chats_are_no_columns(tmp_path: Path) -> None:
    file = tmp_path / "data"
    for value, expected in (
        ({"positive": CHAT, "negative": CHAT}, [Pair(CHAT, CHAT)]),
        ({"positive": [CHAT, "a"], "negative": ["b", CHAT]}, [Pair(CHAT, "b"), Pair("a", CHAT)]),
        ({"positive": ["a"], "negative": ["b"]}, [Pair("a", "b")]),
        ([["a", "b"], ["c", CHAT]], [Pair("a", "b"), Pair("c", CHAT)]),
    ):
        for indent in (None, 2):
            file.write_text(json.dumps(value, indent=indent))
            assert list(read_pairs(file).items) == expected
    for value, count in (({"tokens": [5, 6, 7]}, 1), ({"tokens": [[5, 6], [7]]}, 2)):
        file.write_text(json.dumps(value))
        reader = LineReader(file, "text", '{"tokens": […]}', "invalid_texts")
        assert len(reader.read(lambda item, _: item["tokens"])) == count
    file.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "b"}))
    assert read_prompts(file) == ["a", "b"]
    file.write_text(json.dumps({"prompt": ["a", "b"]}))
    assert read_prompts(file) == ["a", "b"]


def test_a_chat_is_one_item_and_a_list_of_chats_is_many(tmp_path: Path) -> None:
    file = tmp_path / "data"
    for text, count in (
        (json.dumps(CHAT) + "\n" + json.dumps(CHAT), 2),
        (json.dumps([CHAT, CHAT]), 2),
        (json.dumps([CHAT, CHAT], indent=1), 2),
        (json.dumps(CHAT, indent=1), 1),
        (json.dumps(["one", "two", CHAT]), 3),
        (json.dumps("one") + "\n" + json.dumps(CHAT), 2),
    ):
        file.write_text(text)
        assert len(read_prompts(file)) == count


@pytest.mark.parametrize(
    ("data", "at", "says"),
    [
        ('{"text": "a", "text": "b", "label": "c"}\n', "line 1", "the key 'text' stands twice"),
        ('[{"text": "a"}]\n', "item 1", "with 'label'"),
        ('[{"text": "a", "label": "b"}, 3]\n', "item 2", "with 'label'"),
        ('[{"text": "a", "label": "b"}]\n{}\n', "line 1", "more lines behind it"),
        ('[\n {"text": "a", "label": "b"}\n', "line 1", "not JSON"),
        ('{"text": ["a", "b"], "label": ["c"]}\n', "line 1", "got 2 of 'text', 1 of 'label'"),
        ('{"text": ["a"], "label": ["b"]}\n{}\n', "line 1", "more lines behind it"),
        ('{"text": ["a"], "label": "b"}\n', "line 1", "text"),
        ('{"text": "a", "label": "b"\n{"text": "a", "label": "b"}\n', "line 1", "not JSON"),
        ('{"data": [{"text": "a"}]}\n', "item 1", "with 'label'"),
        ("sentence,label\na,b\n", "line 2", "got ['label', 'sentence']"),
        ("text,label,id\na,b,c\n", "line 2", "got ['id', 'label', 'text']"),
        ("text,label\na,b\nc\n", "line 3", "got ['text']"),
        ("text,label\na,b\nc, d,e\n", "after line 2", "3 cells under 2 names"),
        ("Dear all,\nhow are you\n", "line 1", 'needed is {"text": …, "label": …} on each line'),
        ("a text\n", "line 1", "or an array or table of them"),
        (b"text,label\na,\xff\n", "after line 1", "not UTF-8"),
        (b"PAR1\x15\x04\xff\n", "line 1", "a Parquet file"),
        (b"\x1f\x8b\x08\x00\xff\n", "line 1", "gunzip"),
        (b"PK\x03\x04\xff\n", "line 1", "save the sheet as CSV"),
        ("text,label\na,b\n".encode("utf-16"), "line 1", "UTF-16"),
    ],
)
def test_what_cannot_be_read_is_told_where_and_what_to_do(
    tmp_path: Path, data: str | bytes, at: str, says: str
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(FileFormatError, match=f"{at}: ") as caught:
        read_labelled(file)
    assert says in str(caught.value)
    assert caught.value.code == "invalid_labels"


def test_a_table_of_nothing_holds_nothing(tmp_path: Path) -> None:
    for text in ("text,label\n", "[]", "[\n]\n", "\n"):
        (tmp_path / "data").write_text(text)
        with pytest.raises(FileFormatError) as caught:
            read_labelled(tmp_path / "data")
        assert caught.value.code == "no_texts"


def test_labels_of_a_table_with_gaps_are_whole_numbers(tmp_path: Path) -> None:
    file = written(tmp_path, {"text": "x", "label": 1.0}, {"text": "y", "label": 0})
    assert read_labelled(file).labels == ("0", "1")
    with pytest.raises(FileFormatError, match="'label' must be a text or a whole number"):
        read_labelled(written(tmp_path, {"text": "x", "label": 0.5}))


def test_an_empty_file_has_a_code_without_blanks(tmp_path: Path) -> None:
    file = tmp_path / "none.jsonl"
    file.write_text("\n", "utf-8")
    with pytest.raises(FileFormatError) as caught:
        read_labelled(file)
    assert caught.value.code == "no_texts"
