"""One receipt for a request of several sequences."""

from __future__ import annotations

from steer.engines.receipts import merged

__all__ = ["merged"]
