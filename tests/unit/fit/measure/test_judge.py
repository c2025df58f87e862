"""A judge behind a local server that answers badly on purpose."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from steer.errors import SteerError
from steer.fit.measure.judge import JudgeScorer, read_judgement

Reply = Callable[[str, int], tuple[int, str]]


class Judge:
    """Answers with `reply(text, times asked)`; counts what it was asked."""

    def __init__(self) -> None:
        self.reply: Reply = lambda text, asked: (200, "yes")
        self.asked: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.lock = threading.Lock()
        self.url = ""

    def answer(self, body: dict[str, Any], key: str | None) -> tuple[int, bytes]:
        text = body["messages"][-1]["content"].split("<<<\n")[1].split("\n>>>")[0]
        with self.lock:
            self.asked[text] += 1
            self.requests.append(body)
            self.keys.add(key)
            status, content = self.reply(text, self.asked[text])
        message = {"role": "assistant", "content": content}
        choices = [{"index": 0, "finish_reason": "stop", "message": message}]
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "judge"}
        return status, json.dumps({**reply, "choices": choices}).encode()


@pytest.fixture
def judge() -> Iterator[Judge]:
    one = Judge()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, data = one.answer(body, self.headers.get("Authorization"))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    one.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield one
    server.shutdown()
    server.server_close()
    thread.join()


def scorer(judge: Judge, **fields: Any) -> JudgeScorer:
    return JudgeScorer(judge.url, "judge", "Is it French?", retries=0, **fields)


def test_each_text_gets_its_own_score(judge: Judge) -> None:
    judge.reply = lambda text, asked: (200, "Yes." if "oui" in text else "No")
    scores = scorer(judge).judge(["oui", "non", "oui", "oui oui"])
    assert [score.value for score in scores] == [1, 0, 1, 1]
    assert judge.asked == {"oui": 1, "non": 1, "oui oui": 1}
    body = judge.requests[0]
    assert (body["model"], body["temperature"]) == ("judge", 0)
    assert "Is it French?" in body["messages"][1]["content"]
    assert judge.keys == {"Bearer none"}


def test_numbers(judge: Judge) -> None:
    judge.reply = lambda text, asked: (200, f"Score: {text}/10")
    scores = scorer(judge, scale="0-10").judge(["0", "7", "10"])
    assert [score.value for score in scores] == [0, 0.7, 1]


def test_a_non_answer_is_asked_again(judge: Judge) -> None:
    judge.reply = lambda text, asked: (200, "Well …" if asked < 3 else "yes")
    assert scorer(judge).judge(["a"])[0].judged
    assert judge.asked["a"] == 3
    assert [body["temperature"] for body in judge.requests] == [0, 0.7, 0.7]


def test_what_stays_unanswered_is_counted_and_is_no_score(judge: Judge) -> None:
    judge.reply = lambda text, asked: (200, "I cannot say" if text == "5" else "no")
    scores = scorer(judge).judge([str(n) for n in range(10)])
    assert [n for n, score in enumerate(scores) if not score.judged] == [5]
    assert judge.asked["5"] == 3


def test_a_judge_that_does_not_judge_is_an_error(judge: Judge) -> None:
    judge.reply = lambda text, asked: (200, "As a language model …")
    with pytest.raises(SteerError, match="no answer to 2 of 2 texts") as caught:
        scorer(judge).judge(["a", "b"])
    assert caught.value.code == "judge_failed"
    assert sum(judge.asked.values()) == 6


@pytest.mark.parametrize("status", [401, 404, 500])
def test_a_broken_judge_is_an_error(judge: Judge, status: int) -> None:
    judge.reply = lambda text, asked: (status, "")
    with pytest.raises(SteerError, match="cannot be asked") as caught:
        scorer(judge).judge(["a"])
    assert caught.value.code == "judge_failed"


def test_a_busy_judge_is_asked_again(judge: Judge) -> None:
    judge.reply = lambda text, asked: (503 if asked == 1 else 200, "no")
    patient = JudgeScorer(judge.url, "judge", "Is it French?", retries=1)
    assert patient.judge(["a"])[0].value == 0


def test_no_judge_at_all() -> None:
    absent = JudgeScorer("http://127.0.0.1:9/v1", "judge", "?", retries=0)
    with pytest.raises(SteerError) as caught:
        absent.judge(["a"])
    assert caught.value.code == "judge_failed"


def test_a_key_is_not_shown() -> None:
    assert "secret" not in repr(JudgeScorer("http://x", "m", "q", api_key="secret"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Yes", 1.0),
        ("**No.**", 0.0),
        ("Answer: yes", 1.0),
        ("Yes, there is no doubt.", 1.0),
        ("No doubt: yes", None),
        ("Yes and no", None),
        ("Not sure; nobody knows", None),
        ("", None),
    ],
)
def test_yes_or_no_in_a_judges_words(text: str, value: float | None) -> None:
    assert read_judgement(text, "yes-no") == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 0.7),
        ("Rating: 10.", 1.0),
        ("8 out of 10", 0.8),
        ("7,5 / 10", 0.75),
        ("11", None),
        ("-3", None),
        ("7/100", None),
        ("3 or 4", None),
        ("ten", None),
    ],
)
def test_a_number_in_a_judges_words(text: str, value: float | None) -> None:
    assert read_judgement(text, "0-10") == value
