"""What to do when a fetch fails: raise, try again, skip."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ErrorPolicy"]


@dataclass(frozen=True, slots=True)
class ErrorPolicy:
    """Raises at the first error by default. The other choices are refused until they are built.

    Attributes:
        retries: how often a failed call is made again.
        backoff_s: wait before the first retry, in seconds, doubled for each.
        max_backoff_s: the longest wait.
        skip: skip what failed instead of raising.
        max_errors: how many rows (calls, for a plain function) may be skipped: a count, or a share of those tried.
        quarantine: a JSON-lines file for what was skipped.
    """

    retries: int = 0
    backoff_s: float = 0.1
    max_backoff_s: float = 10.0
    skip: bool = False
    max_errors: int | float | None = None
    quarantine: str | None = None
