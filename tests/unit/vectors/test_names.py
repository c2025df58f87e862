"""What ships for different models may lie in one registry, so no name stands for two things."""

from __future__ import annotations

from collections import Counter

from steer_vectors import LIBRARY

PARTS = ("vectors", "relations", "saes", "profiles")


def test_no_name_is_shipped_for_two_models() -> None:
    names = Counter(
        (part, path.stem)
        for part in PARTS
        for path in LIBRARY.glob(f"*/{part}/*")
        if path.suffix in (".safetensors", ".json") or path.is_dir()
    )
    assert names
    assert [name for name, count in names.items() if count > 1] == []
