"""Bodies must say what they are."""

from __future__ import annotations

from fastapi import Request
from starlette.exceptions import HTTPException


async def require_json(request: Request) -> None:
    """Refuses a body that is not declared as JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.method in ("POST", "PUT") and kind != "application/json":
        raise HTTPException(
            415, f"the content type is {kind or 'missing'!r}: send JSON as 'application/json'"
        )
