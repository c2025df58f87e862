"""Reading and rendering contrastive prompts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from steer.engines.fake.engine import ByteTokenizer
from steer.errors import FileFormatError, SteerError
from steer.fit.data.pairs import Pair, PairSet, read_pairs, read_prompts, render
from steer.prompts import Marked

CHAT = [{"role": "user", "content": "hi"}]


def test_texts_and_messages_are_read(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    lines = [{"positive": "é", "negative": "b"}, {"positive": CHAT, "negative": "c"}]
    file.write_text("\n\n".join(json.dumps(line) for line in lines))
    pairs = read_pairs(file)
    assert pairs.items == (Pair("é", "b"), Pair(CHAT, "c"))
    assert pairs.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_set_in_memory_has_the_hash_of_its_file(tmp_path: Path) -> None:
    pairs = PairSet.of([Pair("é", CHAT)])
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"positive": "é", "negative": [{"role": "user", "content": "hi"}]}\n', "utf-8")
    assert read_pairs(file) == pairs


@pytest.mark.parametrize("prompt", ["Is it so?\n (A) Yes\n (B) No", CHAT], ids=["text", "chat"])
@pytest.mark.parametrize(
    "names",
    [
        ("prompt", "chosen", "rejected"),
        ("question", "answer_matching_behavior", "answer_not_matching_behavior"),
    ],
    ids=["preferences", "behaviours"],
)
def test_a_prompt_with_two_answers_is_a_pair(
    tmp_path: Path, names: tuple[str, str, str], prompt: object
) -> None:
    file = tmp_path / "pairs.jsonl"
    line = {**dict(zip(names, (prompt, " (A)", " (B)"), strict=True)), "source": "elsewhere"}
    file.write_text(json.dumps(line))
    (pair,) = read_pairs(file).items
    assert pair == Pair(Marked(prompt, " (A)"), Marked(prompt, " (B)"))
    file.write_text(json.dumps({**line, names[2]: ""}))
    with pytest.raises(FileFormatError, match=f"line 1: {names[0]!r} with {names[2]!r}"):
        read_pairs(file)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[]", "exactly the keys"),
        ('{"positive": "a"}', "exactly the keys"),
        ('{"positive": "a", "negative": "b", "label": 1}', "'label'"),
        ('{"positive": "", "negative": "b"}', "'positive' must be"),
        ('{"positive": "a", "negative": []}', "'negative' must be"),
        ('{"positive": "a", "negative": [{"role": "user"}]}', "'negative' must be"),
        ('{"positive": "a", "negative": [{"role": "user", "content": 1}]}', "'negative' must be"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"positive": "a", "negative": "b"}\n' + line)
    with pytest.raises(FileFormatError, match="line 2") as caught:
        read_pairs(file)
    assert says in str(caught.value)


def test_files_without_content_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="cannot be read"):
        read_pairs(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(FileFormatError, match="no pairs"):
        read_pairs(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(FileFormatError, match="UTF-8"):
        read_pairs(tmp_path / "binary.jsonl")


def test_prompts_come_in_three_forms(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"a"\n{"messages": [{"role": "user", "content": "hi"}]}\n{"prompt": "b"}\n')
    assert read_prompts(file) == ["a", CHAT, "b"]
    file.write_text("7\n")
    with pytest.raises(FileFormatError, match="line 1"):
        read_prompts(file)


def test_an_answer_is_opened_unless_there_is_one() -> None:
    tokenizer = ByteTokenizer()
    asked = tokenizer.decode(render(tokenizer, CHAT))
    answered = tokenizer.decode(
        render(tokenizer, [*CHAT, {"role": "assistant", "content": "hello"}])
    )
    assert asked == "<|bos|><|user|>hi<|assistant|>"
    assert answered == "<|bos|><|user|>hi<|assistant|>hello"
    assert render(tokenizer, "hi") == tokenizer.encode("hi")


def test_messages_need_a_chat_template() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = None  # type: ignore[assignment]
    with pytest.raises(SteerError) as caught:
        render(tokenizer, CHAT)
    assert caught.value.code == "no_chat_template"
