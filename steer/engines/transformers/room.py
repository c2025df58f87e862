"""How many tokens the caches of running sequences may hold.

Whoever is admitted must be able to end: a cache that grows beyond memory takes the whole process
with it. So a sequence counts from the start for all the tokens that it may come to, its prompt and
those that it may generate, and who finds no room waits. Where rows are padded, the longest one
makes all others as wide.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SLACK = 128
"""Columns of padding that all rows may have in front before they are dropped, where there is room
enough; otherwise an eighth of it."""
SHARE = 0.4
"""Of the memory that is free at start: a second batch may run beside the first, for requests with
adapters, and passes need some as well."""
_UNKNOWN = 1 << 62


@dataclass(frozen=True)
class CacheRoom:
    """Room for so many tokens, padding included."""

    tokens: int = _UNKNOWN

    @staticmethod
    def on(device: torch.device, token_bytes: int, *, least: int) -> CacheRoom:
        """A share of the memory that is free now, where a token takes `token_bytes`; `least` tokens
        where there is hardly any. Without bound where a token takes none, or nobody says how much
        is free."""
        free = free_bytes(device)
        if not token_bytes or free is None:
            return CacheRoom()
        return CacheRoom(max(int(SHARE * free) // token_bytes, least))

    @property
    def slack(self) -> int:
        """Columns of padding that all rows may have in front."""
        return min(SLACK, self.tokens // 8)

    @property
    def widest(self) -> int:
        """How long a padded row may become that has it all to itself."""
        return max(self.tokens - self.slack, 1)

    def padded(self, lengths: Sequence[int]) -> bool:
        """Whether rows that may come to `lengths` fit in beside one another."""
        return len(lengths) * (max(lengths, default=0) + self.slack) <= self.tokens

    def apart(self, lengths: Sequence[int]) -> bool:
        """The same of sequences with a cache each."""
        return sum(lengths) <= self.tokens


def token_bytes(cache: Any, tokens: int) -> int:
    """What each of the `tokens` in a cache takes in its keys and values; states that do not grow
    take nothing."""
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None) or ()
    kept = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))
    held = [one for one in kept if isinstance(one, torch.Tensor) and one.ndim == 4]
    return sum(one.nbytes for one in held) // tokens


def free_bytes(device: torch.device) -> int | None:
    """The memory that is free on `device`; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [one for one in (_available(), _left_of_limit()) if one is not None]
    return min(found, default=None)


def _available() -> int | None:
    """What Linux could give without swapping; elsewhere half of all memory."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return None


def _left_of_limit(
    root: Path = Path("/sys/fs/cgroup"), said: Path = Path("/proc/self/cgroup")
) -> int | None:
    """What the limits of a container leave, in either version of control groups: those of this
    process's group and of all above it. Pages of files count as free, as they can be dropped."""
    left = [one for one in map(_left_in, _groups(root, said)) if one is not None]
    return min(left, default=None)


def _groups(root: Path, said: Path) -> set[Path]:
    """The folders of this process's groups that count memory. Within a container they may be shown
    from its own group on, whatever the process is told of its place."""
    try:
        lines = [line.split(":", 2) for line in said.read_text().splitlines()]
    except OSError:
        lines = []
    found = {root, root / "memory"}
    for _, controllers, path in (line for line in lines if len(line) == len(("id", "of", "path"))):
        if not controllers or "memory" in controllers.split(","):
            base = root / "memory" if controllers else root
            own = base / path.lstrip("/")
            found |= {own, *(one for one in own.parents if base in one.parents)}
    return found


def _left_in(group: Path) -> int | None:
    unified = (group / "memory.max").exists()
    limited, used = (
        ("memory.max", "memory.current")
        if unified
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    prefix = "" if unified else "total_"
    try:
        limit = (group / limited).read_text().strip()
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        files = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
        taken = int((group / used).read_text()) - files
        return None if limit == "max" else max(int(limit) - taken, 0)
    except (OSError, ValueError):
        return None
