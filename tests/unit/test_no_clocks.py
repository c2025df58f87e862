"""No test depends on how fast a machine is: clocks, pauses and short bounds are found here.

What a test waits for is told to it; `liveness` holds the only bound, and says why.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

ALLOWED = {
    "support/liveness.py": "the bound that makes a hang a failure, and the only place that polls",
    "support/fuzz.py": "run by hand: measures files, and ends a reader that hangs",
    "unit/test_no_clocks.py": "has an example of everything",
}

_TIMES = {"monotonic", "perf_counter", "process_time", "thread_time", "time"}
CLOCKS = {
    "time": {"sleep", *_TIMES, *(f"{name}_ns" for name in _TIMES)},
    "asyncio": {"sleep", "timeout", "timeout_at", "wait_for"},
    "anyio": {"sleep", "fail_after", "move_on_after"},
}

WAITS = {"wait": 0, "join": 0, "result": 0, "acquire": 1, "wait_for": 2}
"""Methods that wait, and where among their arguments they take a bound."""

BOUND = "LIVENESS_SECONDS"
FILES = sorted(path.relative_to(TESTS).as_posix() for path in TESTS.rglob("*.py"))


def findings(source: str) -> Iterator[str]:
    """What in `source` goes by a clock, scripts in its strings included; times that are data, of a
    file or for a lease, do not."""
    tree = ast.parse(source)
    data = {id(node) for given in ast.walk(tree) if _is_data(given) for node in ast.walk(given)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in CLOCKS:
            for name in {alias.name for alias in node.names} & CLOCKS[node.module]:
                yield f"line {node.lineno}: from {node.module} import {name}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module, name = node.value.id, node.attr
            is_data = name == "time" and id(node) in data
            if name in CLOCKS.get(module, ()) and not is_data:
                yield f"line {node.lineno}: {module}.{name}"
        if isinstance(node, ast.Call):
            yield from _short_bounds(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from (f"line {node.lineno}, in a script: {one}" for one in _script(node.value))


def _is_data(node: ast.AST) -> bool:
    """Whether a time inside is written down (`os.utime`) or is a clock that the test hands over."""
    if isinstance(node, ast.Lambda):
        return not node.args.args
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "utime"
    )


def _script(text: str) -> list[str]:
    """The findings in a string that is a program."""
    if "import " not in text:
        return []
    try:
        return list(findings(text))
    except SyntaxError:
        return []


def _short_bounds(call: ast.Call) -> Iterator[str]:
    """Numbers written where a call takes a bound in seconds."""
    bounds = [one.value for one in call.keywords if one.arg in ("timeout", "deadline", "patience")]
    name = call.func.attr if isinstance(call.func, ast.Attribute) else None
    if name in WAITS:
        bounds += call.args[WAITS[name] : WAITS[name] + 1]
    for bound in bounds:
        number = bound.value if isinstance(bound, ast.Constant) else None
        if isinstance(number, (int, float)) and not isinstance(number, bool) and number > 0:
            yield f"line {call.lineno}: waits {number} s, which should be {BOUND}"


@pytest.mark.parametrize("name", FILES)
def test_nothing_goes_by_a_clock(name: str) -> None:
    found = list(findings((TESTS / name).read_text("utf-8")))
    if name in ALLOWED:
        assert found, f"{name} needs no exception any more"
    else:
        assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "time.sleep(0.1)",
        "await asyncio.sleep(0.005)",
        "await asyncio.sleep(0)",
        "from time import perf_counter",
        "assert time.perf_counter() - started < 10",
        "while time.monotonic() < until: pass",
        "assert made.time() and time.time() < 5",
        "async with asyncio.timeout(3): pass",
        "await asyncio.wait_for(task, LIMIT)",
        "run('import time; time.sleep(1)')",
        "later(lambda: time.sleep(1))",
        "thread.join(20)",
        "assert gate.acquire(timeout=20)",
        "future.result(5)",
        "httpx.get(url, timeout=2.5)",
        'engine.wait_for("cancelled", 3, timeout=10)',
    ],
)
def test_what_goes_by_a_clock_is_found(line: str) -> None:
    body = f"async def test():\n    {line}"
    assert list(findings(body))


@pytest.mark.parametrize(
    "line",
    [
        "thread.join(LIVENESS_SECONDS)",
        "assert event.wait(timeout=LIVENESS_SECONDS)",
        "thread.join()",
        "runner.stop(patience=0)",
        "os.utime(old, (time.time() - 7200,) * 2)",
        "Leases(place, clock=lambda: time.time() + 60)",
        '", ".join(names)',
        'card.get("layer", 3)',
    ],
)
def test_what_does_not_is_left_alone(line: str) -> None:
    assert list(findings(f"async def test():\n    {line}")) == []
