"""What to do when a fetch fails: raise, try again, skip; and the account of what was skipped."""

from __future__ import annotations

import collections
import json
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from input_workers.checks import check_whole
from input_workers.errors import ConfigError, FetchFailed, describe

__all__ = ["ErrorPolicy", "Quarantine", "QuarantinedRows", "TooManySkipped"]

log = logging.getLogger("input_workers")

# A share of errors is judged after this many calls: one bad row among the first ten is no tenth.
PROBATION_CALLS = 100

# What `stats().quarantine` keeps, the latest: enough to see what is wrong; the file has them all.
KEPT_IN_QUARANTINE = 1000
MAX_ERROR_CHARS = 1000
WARNING_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class ErrorPolicy:
    """Raises at the first error by default. Retries come before skipping.

    What the package itself refuses, a SpecMismatch, is raised in any case: nothing is ever cast, and trying again or
    skipping would hide a mistake in the source.

    Attributes:
        retries: how often a failed call is made again.
        backoff_s: wait before the first retry, in seconds, doubled for each, less a random part of up to a half.
        max_backoff_s: the longest wait.
        skip: skip what failed instead of raising: of a Stream the rows that fail, of a plain function the call. A call
            that hangs (`fetch_timeout_s`) leaves its thread behind each time: give max_errors too.
        max_errors: how many rows (calls, for a plain function) may be skipped: a count, of which exactly that many pass,
            or a share (a float from 0 to 1) of those tried, judged after 100 calls; None: any number.
        quarantine: a JSON-lines file, appended to, a line for all that was skipped at once.

    Raises:
        ConfigError: a value is wrong.
    """

    retries: int = 0
    backoff_s: float = 0.1
    max_backoff_s: float = 10.0
    skip: bool = False
    max_errors: int | float | None = None
    quarantine: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        check_whole("ErrorPolicy: retries", self.retries, 0)
        for name in ("backoff_s", "max_backoff_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ConfigError(f"ErrorPolicy: {name}: got {value!r}; wanted seconds, at least 0")
        if not isinstance(self.skip, bool):
            raise ConfigError(f"ErrorPolicy: skip: got {self.skip!r}; wanted True or False")
        most = self.max_errors
        count = isinstance(most, int) and not isinstance(most, bool) and most >= 0
        share = isinstance(most, float) and 0.0 <= most <= 1.0
        if most is not None and not count and not share:
            raise ConfigError(f"ErrorPolicy: max_errors: got {most!r}; wanted a count, a share such as 0.01, or None")
        if self.quarantine is not None and not isinstance(self.quarantine, (str, os.PathLike)):
            raise ConfigError(f"ErrorPolicy: quarantine: got {self.quarantine!r}; wanted the path of a file")
        if not self.skip and (most is not None or self.quarantine is not None):
            given = "max_errors" if most is not None else "quarantine"
            raise ConfigError(f"ErrorPolicy: {given} says what may be skipped; wanted skip=True with it")

    @property
    def raises_at_once(self) -> bool:
        """Whether a failure is simply raised."""
        return not self.retries and not self.skip

    def wait_seconds(self, tries: int) -> float:
        """Return how long to wait after so many failed tries, from 1."""
        longest = min(self.max_backoff_s, self.backoff_s * 2.0 ** min(tries - 1, 1000))
        return longest * random.uniform(0.5, 1.0)  # so that fetchers do not come back all at once


@dataclass(frozen=True, slots=True)
class QuarantinedRows:
    """What was skipped at once.

    Attributes:
        worker_id: who tried.
        request, epoch: of a Stream; None for a call of a plain function.
        rows: the row numbers in the source.
        files: what they are read from, where the source knows it.
        error: the last one.
    """

    worker_id: int
    request: int | None
    epoch: int | None
    rows: tuple[int, ...]
    files: tuple[str, ...]
    error: str


class TooManySkipped(FetchFailed):
    """More failed than may be skipped. Its `__cause__` is the last error; users see a FetchFailed."""


class Quarantine:
    """Counts what a source skipped, over all its runs, and says when it is too much. Thread-safe.

    Args:
        source: the name.
        policy: sets the limit.
        tried: returns (rows or calls tried, calls made) so far.
    """

    # Invariant under _lock: `_skipped` is what was skipped, `latest` its end.

    def __init__(self, source: str, policy: ErrorPolicy, tried: Callable[[], tuple[int, int]]) -> None:
        self._source = source
        self._policy = policy
        self._tried = tried
        self._lock = threading.RLock()
        self._skipped = 0
        self._latest: collections.deque[QuarantinedRows] = collections.deque(maxlen=KEPT_IN_QUARANTINE)
        self._warned = self._complained = -math.inf
        self._unwarned = 0

    @property
    def latest(self) -> tuple[QuarantinedRows, ...]:
        """What was skipped last, the oldest first."""
        with self._lock:
            return tuple(self._latest)

    def open(self) -> None:
        """Find out whether the file can be written. Raises ConfigError."""
        path = self._policy.quarantine
        if path is not None:
            try:
                # Not blocking: a pipe that nobody reads is an error here, not a wait.
                os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666))
            except (OSError, ValueError) as error:
                raise ConfigError(f"ErrorPolicy: quarantine: {error}; wanted a file that can be written") from error

    def skip(self, entry: QuarantinedRows, count: int, error: BaseException) -> None:
        """Account for `count` more. Raises TooManySkipped, from the error, if that is more than may be skipped."""
        most = self._policy.max_errors
        tried, calls = self._tried() if isinstance(most, float) else (0, 0)
        if entry.request is not None:  # a failed call of a plain function was counted; rows are not yet
            tried += count
        with self._lock:
            skipped = self._skipped + count
            if isinstance(most, float):
                over = calls >= PROBATION_CALLS and skipped > most * tried
            else:
                over = most is not None and skipped > most
            if not over:
                self._skipped = skipped
                self._latest.append(entry)
                self._unwarned += 1
                now = time.monotonic()
                warn = now - self._warned >= WARNING_SECONDS
                if warn:
                    self._warned = now
                    news, self._unwarned = self._unwarned, 0
        if over:
            limit = f"{most:.2%} of {tried} tried" if isinstance(most, float) else f"{most}"
            raise TooManySkipped(
                f"source {self._source!r}: {skipped} failed, more than may be skipped (max_errors: {limit})"
            ) from error
        if warn:
            more = f" ({news} such since the last of these lines)" if news > 1 else ""
            log.warning("source %r: skipped %d so far, now %.500s%s", self._source, skipped, entry, more)
        self._write(entry)

    def _write(self, entry: QuarantinedRows) -> None:
        path = self._policy.quarantine
        if path is None:
            return
        line = json.dumps({"source": self._source, **asdict(entry)}) + "\n"
        try:
            # One write to a file opened for appending: lines of several fetchers, or processes, do not mix.
            with open(path, "ab", buffering=0) as file:
                file.write(line.encode())
        except OSError as error:  # the rows are in the ledger and in stats(): no reason to end a training
            now = time.monotonic()
            with self._lock:
                complain = now - self._complained >= WARNING_SECONDS
                if complain:
                    self._complained = now
            if complain:
                log.error("source %r: cannot write to the quarantine file: %s", self._source, describe(error))
