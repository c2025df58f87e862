"""What is read of callgrind's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.vllm.instructions import LINES, _named, read

DUMP = """# callgrind format
desc: Trigger: Client Request: {"batch": 8, "diet": "nothing steered", "steps": 4}
positions: line
events: Ir Dr Dw I1mr D1mr D1mw ILmr DLmr DLmw
summary: 8100 7 6 5 4 3 20 60


fl=(1) a.c
fn=(1) first'2
10 80 3
+2 16
cfn=(2) second
calls=3 20
12 8000
14 4

fn=(2)
20 8000
totals: 8100 7 6 5 4 3 20 60
"""


def test_a_dump_is_read_by_function_without_what_each_calls(tmp_path: Path) -> None:
    path = tmp_path / "profile.1"
    path.write_text(DUMP)
    found = read(path)
    assert (found["batch"], found["diet"]) == (8, "nothing steered")
    assert found["instructions"] == 8100 / 4
    assert found[LINES] == (20 + 60) / 4  # what ends in zeros is shorter
    assert found["functions"] == {"second": 8000 / 4, "first": 100 / 4}


@pytest.mark.parametrize("reason", ["Program termination", "--dump-before=f"])
def test_what_a_process_leaves_at_its_end_is_no_dump(tmp_path: Path, reason: str) -> None:
    path = tmp_path / "profile"
    path.write_text(DUMP.replace("Client Request: ", f"{reason} "))
    assert _named(path) is None
