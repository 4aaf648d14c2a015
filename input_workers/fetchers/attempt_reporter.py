"""Reports of what an Attempt in a worker process does, for the parent, which measures each call and counts what failed."""

from __future__ import annotations

from input_workers.contracts import FetchRequest
from input_workers.fetchers.call_account import CallAccount
from input_workers.fetchers.frames import ATTEMPT, Link, raised
from input_workers.fetchers.recovery import Attempt, AttemptReport

__all__ = ["AttemptReporter"]


class AttemptReporter:
    """Observes the calls of an Attempt in a worker process, and sends a report when one begins.

    Args:
        attempt: whose calls these are.
        account: of the calls' times.
        link: to the parent.
    """

    def __init__(self, attempt: Attempt, account: CallAccount, link: Link) -> None:
        self._attempt = attempt
        self._account = account
        self._link = link
        self._calls: list[tuple[str, float, float]] = []

    def begin_call(self, request: FetchRequest | None) -> None:
        """A call begins."""
        self._account.begin_call()
        self.send(is_calling=True)

    def end_call(self, failed: bool = False) -> bool:
        """It has ended."""
        self._account.end_call()
        if not failed:
            self._calls.append(("", *self._account.times))
        return True

    def count_error(self, name: str) -> None:
        """It raised an error of this name."""
        self._calls.append((name, *self._account.times))

    def send(self, is_calling: bool = False) -> None:
        """Send a report. Raises OSError: the parent is gone."""
        attempt = self._attempt
        skipped = [(each.rows, each.text, raised(each.error)) for each in attempt.take_skipped()]
        calls, self._calls = self._calls, []
        where = attempt.row, attempt.is_split, attempt.is_together, attempt.tries
        self._link.send((ATTEMPT, AttemptReport(*where, skipped, calls, is_calling)))
