"""All sources of a trainer: they are started and stopped together. The only place that knows every part."""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Self

from input_workers.coordinator.data_input_coordinator import DataInputCoordinator, DeviceInput
from input_workers.coordinator.reporter import Ticker, log, log_line
from input_workers.coordinator.settings import DeviceSettings, SourceSettings
from input_workers.coordinator.source_core import LAST_CALL_SECONDS, SourceCore
from input_workers.coordinator.state_file import load_file, save_file
from input_workers.coordinator.state_of_all import load_all, state_of_all
from input_workers.coordinator.tracing import Tracing
from input_workers.errors import ConfigError, LifecycleError
from input_workers.feeds import Feed
from input_workers.lifecycle import State, released
from input_workers.metrics.snapshot import SourceStats, StopReport, StuckThread

__all__ = ["GlobalCoordinator"]


class GlobalCoordinator:
    """Starts and stops sources together. Thread-safe; a context manager that starts on entry and stops on exit.

    Attributes:
        last_stop: how the last stop went, or None.
    """

    # Invariant under _changed: one thread, `_owner`, is starting or stopping; others wait. `_sources` maps a source's
    # name to its handle and core, which are never replaced.

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._state = State.NEW
        self._owner: int | None = None
        self._before = State.NEW
        self._sources: dict[str, tuple[DataInputCoordinator, SourceCore]] = {}
        self._log: Ticker | None = None
        self._log_finalizer: weakref.finalize[..., GlobalCoordinator] | None = None
        self._pid = os.getpid()
        self._logged: list[SourceCore] = []
        self._worker_ids = itertools.count()
        self.last_stop: StopReport | None = None

    def add(self, settings: SourceSettings, device: DeviceSettings, num_workers: int | Literal["auto"]) -> DataInputCoordinator:
        """Register a source, or a further device of one; see `init_data_input_workers`."""
        self._begin_anew_in_child()
        with self._changed:
            known = self._sources.get(settings.name)
            if known is None:
                core = SourceCore(settings, self._worker_ids.__next__)
                handle = DataInputCoordinator(core)
            else:
                handle, core = known
                if core.device_name(device.name_scope) in core.devices:
                    raise ConfigError(
                        f"source {core.device_name(device.name_scope)!r} is registered already; wanted another "
                        "input_source_name, or another name_scope for a further device of the same source"
                    )
                differing = core.settings.difference(settings)
                if differing is not None:
                    raise ConfigError(
                        f"source {settings.name!r} is registered already with another {differing}; a further device "
                        "needs the same fetch function and settings"
                    )
                if bool(core.worker_ids) != bool(num_workers):
                    raise ConfigError(f"source {settings.name!r}: num_workers=0 for one device and not for another")
            if num_workers == "auto":  # the number is the source's, however many devices it has
                num_workers = settings.first_workers if known is None else 0
            core.add_device(device, [next(self._worker_ids) for _ in range(num_workers)])
            self._sources[settings.name] = handle, core
            return handle

    def start(self) -> None:
        """Start every source that does not run. All are started, or none is; idempotent.

        Raises:
            LifecycleError: called by an init function.
            Exception: what an init function raised, or what starting a thread did; nothing runs then.
        """
        self._begin_anew_in_child()
        me = self._claimant()
        try:
            before = self._claim(State.STARTING, math.inf, me)
            if before is None:
                raise LifecycleError("start() in a fetch function whose coordinator is being stopped")
            chosen = [(handle, core) for handle, core in self._copy() if not core.is_running]
            if not chosen:
                return
            new = [pair for pair in chosen if not pair[1].initialised]
            try:
                for _, core in chosen:
                    core.make_feeds()
                for handle, core in new:
                    if core.settings.init_fun is not None:
                        core.settings.init_fun(handle, self)
                    core.initialised = True
                for _, core in chosen:  # what an init function has loaded or reset counts
                    core.build()
                for _, core in chosen:
                    core.start()
                self._start_log([core for _, core in chosen], first=before is not State.RUNNING)
                for _, core in chosen:
                    core.started()
            except BaseException:
                for _, core in new:
                    core.initialised = False
                for _, core in chosen:
                    core.abort()
                deadline = time.monotonic() + 5.0  # for the threads that were started
                for _, core in chosen:
                    core.join(deadline)
                    core.not_started()
                if before is not State.RUNNING and self._log is not None:
                    self._log.request_stop()
                    self._log.join(deadline)
                self._state = before
                raise
            self._state = State.RUNNING
        finally:
            # No call before the claim is given up: Ctrl-C is handled at calls.
            if self._owner == me:
                if self._state is State.STARTING:
                    self._state = self._before
                self._owner = None
                self._notify()

    def _start_log(self, cores: list[SourceCore], first: bool) -> None:
        """Start the thread that writes log lines. It knows the sources' cores, and no coordinator."""
        if first:
            self._logged = []
            logged = self._logged

            def write() -> None:
                for core in list(logged):
                    log_line(core)

            self._log = Ticker("input-workers-log", write)
            self._log.start()
            if self._log_finalizer is not None:
                self._log_finalizer.detach()  # or each start would leave one behind
            self._log_finalizer = weakref.finalize(self, self._log.request_stop)
            self._log_finalizer.atexit = False
        self._logged += [core for core in cores if core not in self._logged]

    def stop(self, timeout_s: float = 5.0) -> bool:
        """Stop every source; True: everything ended. `last_stop` says more. Idempotent; it may be started again.

        Args:
            timeout_s: one deadline for everything, in seconds. What is stuck then is named, and left.

        Raises:
            LifecycleError: called by an init function.
        """
        self._begin_anew_in_child()
        started = time.monotonic()
        deadline = started + timeout_s
        me = self._claimant()
        try:
            before = self._claim(State.STOPPING, timeout_s, me)
            if before is None:
                return False  # somebody else has been stopping it, or starting it, all this time
            if before is State.NEW:
                self._state = State.NEW
                return True
            for _, core in self._copy():
                core.abort()
            stuck: tuple[StuckThread, ...] = ()
            failures: dict[str, str] = {}
            ledgers: dict[str, str] = {}
            for _, core in self._copy():
                more, wrong = core.join(deadline)
                stuck += more
                failure = core.run.signal.failure if core.run is not None else None
                messages = [failure.message] if failure is not None else []
                for message in wrong:
                    log.error("%s", message)
                if messages or wrong:
                    failures[core.settings.name] = "; ".join([*messages, *wrong])
                ledgers[core.settings.name] = core.stats().ledger
            if self._log is not None:
                self._log.request_stop()
                deadline = max(deadline, time.monotonic() + LAST_CALL_SECONDS)
                with released([lock for _, core in self._copy() for lock in core.locks()]):
                    stuck += tuple(StuckThread(*each) for each in self._log.join(deadline))
            self.last_stop = StopReport(
                ended=not stuck,
                stuck=stuck,
                failures=MappingProxyType(failures),
                ledgers=MappingProxyType(ledgers),
                seconds=time.monotonic() - started,
            )
            self._state = State.STOPPED
            if stuck:
                log.warning("stop: %d threads did not end: %s", len(stuck), ", ".join(each.name for each in stuck))
            return not stuck
        finally:
            if self._owner == me:
                if self._state is State.STOPPING:
                    self._state = self._before
                self._owner = None
                self._notify()

    def _begin_anew_in_child(self) -> None:
        """In a process that was forked from ours: the threads, and the locks that they held, are the parent's."""
        if os.getpid() != self._pid:
            self._pid, self._changed = os.getpid(), threading.Condition()
            self._state, self._owner, self._before = State.NEW, None, State.NEW
            self._log, self._log_finalizer, self._logged = None, None, []

    def _claimant(self) -> int:
        """Return the caller's thread. Raises LifecycleError if it is starting or stopping this coordinator already."""
        me = threading.get_ident()
        if self._owner == me:
            raise LifecycleError(
                f"a start or stop while {self._state.value}: not from an init function, nor from a signal handler that has "
                "interrupted one; set a flag there"
            )
        return me

    def _claim(self, state: State, timeout_s: float, me: int) -> State | None:
        """Be the one who starts or stops, until `_owner` is None again; return the state before, None: it took too long."""
        with self._changed:
            timeout = None if timeout_s == math.inf else min(timeout_s, threading.TIMEOUT_MAX)
            # A stop waits for our own threads, so they must not wait for it: a fetch function may call anything.
            own = any(core.has_thread(threading.current_thread()) for _, core in self._sources.values())
            self._changed.wait_for(lambda: self._owner is None or (own and self._state is State.STOPPING), timeout)
            if self._owner is not None:
                return None
            self._before, self._state, self._owner = self._state, state, me
            return self._before

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        if error is not None and self.last_stop is not None:
            for name, failure in self.last_stop.failures.items():
                error.add_note(f"input source {name!r}: {failure}")

    def __getitem__(self, key: str) -> Any:
        """Return a source by its name, or one of its devices by "gpu_0/train"."""
        scope, _, name = key.rpartition("/")
        known = self._sources.get(name)
        if known is None:
            raise KeyError(f"no source {name!r}; there are {list(self._sources)}")
        handle, core = known
        if not scope:
            return handle
        if key not in core.devices:
            raise KeyError(f"source {name!r} has no device {key!r}; it has {list(core.devices)}")
        return DeviceInput(core, key, handle)

    def __iter__(self) -> Iterator[DataInputCoordinator]:
        return iter([handle for handle, _ in self._copy()])

    def __len__(self) -> int:
        return len(self._sources)

    def __bool__(self) -> bool:
        return True  # also without a source: `coordinator or iw.GlobalCoordinator()` keeps the one that was given

    def get_new_worker_id(self) -> int:
        """Return a worker id that nobody has."""
        return next(self._worker_ids)

    def get_worker_ids(self) -> list[int]:
        """Return the ids of all fetchers, also of those that rest (num_workers="auto")."""
        return [worker_id for _, core in self._copy() for worker_id in core.worker_ids]

    def stats(self) -> dict[str, SourceStats]:
        """Return the numbers of every source, by name."""
        return {core.settings.name: core.stats() for _, core in self._copy()}

    def reset_data_input(self, name_scope: str, name: str, feed: Feed, batch_size: int) -> None:
        """Let a device of a source have another feed or batch size, from the next batch that is laid out.

        Raises ConfigError, and changes nothing: there is no such device, or its feed cannot be made.
        """
        known = self._sources.get(name)
        if known is None or known[1].device_name(name_scope) not in known[1].devices:
            raise ConfigError(f"reset_data_input: no device {name_scope!r} of a source {name!r}; there are {self._keys()}")
        core = known[1]
        device = DeviceSettings.checked(name_scope, feed, batch_size, core.settings.batch_axes)
        made = device.make_feed()  # first, and without a lock: it may take long to import a framework, or fail
        with self._changed:
            core.devices[core.device_name(name_scope)] = device
            if core.run is not None and core.is_running:
                core.run.retarget(core.device_name(name_scope), device, made)

    def trace(self, path: str | os.PathLike[str], seconds: float = 5.0) -> Tracing:
        """Record every source that runs into one file; see `DataInputCoordinator.trace`."""
        return Tracing([core for _, core in self._copy()], path, seconds)

    def state_dict(self) -> dict[str, Any]:
        """Return where every Stream is; see `DataInputCoordinator.state_dict`. Plain functions have no position."""
        return state_of_all([core for _, core in self._copy()])

    def load_state_dict(self, state: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
        """Let the next `start()` begin where a state, or one of each shard, says: all sources, or none if one cannot.

        Raises:
            StateMismatch: as for `DataInputCoordinator.load_state_dict`, or the sources are not the same.
            LifecycleError: a source is running.
        """
        load_all([core for _, core in self._copy()], state)

    def save_state(self, path: str | os.PathLike[str]) -> None:
        """Write `state_dict()` to a file: at every moment it is the old one or the new one, whole.

        Raises:
            OSError: it cannot be written; the old file is intact.
        """
        save_file(path, self.state_dict())

    def load_state(self, path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> None:
        """Load what `save_state` wrote; of several shards, all their files, where the number of shards has changed.

        Raises:
            OSError: it cannot be read.
            StateMismatch: the file was cut or changed, or as for `load_state_dict`. Every source is as it was.
        """
        if isinstance(path, (str, os.PathLike)):
            self.load_state_dict(load_file(path))
        else:
            self.load_state_dict([load_file(each) for each in path])

    def _copy(self) -> list[tuple[DataInputCoordinator, SourceCore]]:
        with self._changed:
            return list(self._sources.values())

    def _keys(self) -> list[str]:
        return [name for _, core in self._sources.values() for name in core.devices]

    def __repr__(self) -> str:
        return f"<GlobalCoordinator {self._state.value}: {', '.join(self._keys()) or 'no source'}>"
