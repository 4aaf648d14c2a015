"""A trace, from its start to its file: what each thread of running sources did for some seconds."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from input_workers.coordinator import exit_hook
from input_workers.coordinator.state_file import check_writable, replacing
from input_workers.errors import ConfigError, InputWorkersError, LifecycleError, WaitTimeout, describe
from input_workers.fetchers.threads import join_threads
from input_workers.metrics.trace import SourceTrace, Trace
from input_workers.metrics.trace_events import text_of, unfinished

if TYPE_CHECKING:
    from input_workers.coordinator.source_core import SourceCore

__all__ = ["Tracing"]

log = logging.getLogger("input_workers")

# How often queue depths are looked at, and whether the sources still run.
SAMPLE_SECONDS = 0.01


class Tracing:
    """A trace, in the making until `wait` returns. Thread-safe.

    It ends by itself: after its seconds, with the last of its sources, or when it has 200,000 events. A thread of its own then
    writes the file, which appears whole or not at all.

    Args:
        cores: what to trace: those of them that run.
        path: of the file.
        seconds: for how long.

    Raises:
        ConfigError, LifecycleError, OSError: see `DataInputCoordinator.trace`.

    Attributes:
        path: of the file.
    """

    def __init__(self, cores: Sequence[SourceCore], path: str | os.PathLike[str], seconds: float) -> None:
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
            raise ConfigError(f"trace: seconds: got {seconds!r}; wanted a number above 0, and an end")
        self._cores = [core for core in cores if core.run is not None and core.run.state != "stopped"]
        if not self._cores:
            names = ", ".join(repr(core.settings.name) for core in cores) or "none"
            raise LifecycleError(f"trace: no source runs (of {names}); call start() first")
        self.path = os.path.abspath(os.fsdecode(path))
        self.forked = False
        check_writable(self.path)
        self._stop = threading.Event()
        self._done = threading.Event()
        self._error: BaseException | None = None
        trace = Trace(self.path, float(seconds))
        name = self._cores[0].settings.name if len(self._cores) == 1 else "all"
        self._thread = threading.Thread(target=self._run, args=(trace,), name=f"trace-{name}", daemon=True)
        begun: list[SourceCore] = []
        try:
            for core in self._cores:
                source = SourceTrace(trace, core.settings.name, core.settings.fetchers.kind == "process")
                core.recorder.begin_trace(source)
                begun.append(core)
                trace.sources.append(source)
                core.tracing = self
            exit_hook.remember(self)
            self._thread.start()
        except BaseException:
            exit_hook.forget(self)
            for core in begun:
                core.recorder.end_trace()
                core.tracing = None
            raise

    def wait(self, timeout_s: float | None = None) -> str:
        """Wait until the file is there; return its path. Not in the thread that is to train meanwhile.

        Args:
            timeout_s: how long to wait, in seconds; None: to its end.

        Raises:
            WaitTimeout: it is not there in time; wait again.
            InputWorkersError: it could not be written; the cause says why. There is no new file.
        """
        if self.forked:
            raise LifecycleError("this process was forked from the one that traces")
        if not self._done.wait(None if timeout_s is None else min(max(0.0, timeout_s), threading.TIMEOUT_MAX)):
            raise WaitTimeout(f"trace into {self.path}: not done within {timeout_s:g} s")
        if self._error is not None:
            raise InputWorkersError(f"the trace could not be written: {describe(self._error)}") from self._error
        return self.path

    def request_stop(self) -> None:
        """End it now; the file will show what there is."""
        self._stop.set()

    def stop(self, deadline: float) -> list[tuple[str, str]]:
        """End it, and wait for the file until `time.monotonic()` reaches the deadline; return (name, stack) if it is late."""
        self._stop.set()
        return join_threads([self._thread], deadline)

    @property
    def is_over(self) -> bool:
        """Whether none of its sources runs any more."""
        return all(core.run is None or core.run.state == "stopped" for core in self._cores)

    def _run(self, trace: Trace) -> None:
        try:
            try:
                self._record(trace)
            finally:
                ended = min(time.monotonic(), trace.until, trace.room.used_up_at)
                for core in self._cores:
                    core.recorder.end_trace()
            going_on = unfinished(trace, [core.recorder for core in self._cores])
            with replacing(self.path) as file:
                for piece in text_of(trace, ended, going_on):
                    file.write(piece)
        except BaseException as error:  # there may be nobody who waits
            self._error = error
            log.error("the trace into %s could not be written: %s", self.path, describe(error))
        finally:
            for core in self._cores:
                if core.tracing is self:  # another may have begun while this one was written
                    core.tracing = None
            self._done.set()
            exit_hook.forget(self)

    def _record(self, trace: Trace) -> None:
        now = time.monotonic()
        while not self._stop.is_set() and now < trace.until and trace.room.used_up_at == math.inf and not self.is_over:
            for core in self._cores:
                core.note_depths(trace, now)
            self._stop.wait(min(SAMPLE_SECONDS, trace.until - now))
            now = time.monotonic()
