"""How the fetch function is run: one loop, and backends that run it in many threads (or processes, or actors)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Threads"]


@dataclass(frozen=True, slots=True)
class Threads:
    """Fetchers as threads: for fetch functions that wait or release the GIL."""
