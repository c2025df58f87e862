"""Small JSON files that describe others: an object of a bounded size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from steer.errors import FileFormatError


def read_json_object(path: Path, most: int) -> dict[str, Any]:
    """The object in a file of at most `most` bytes; raises `FileFormatError` naming the file."""
    if path.stat().st_size > most:
        raise FileFormatError(f"{path.name} is larger than {most} bytes")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path.name} is not JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise FileFormatError(f"{path.name} does not hold an object")
    return value
