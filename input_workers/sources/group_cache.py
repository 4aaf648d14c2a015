"""Row groups that were read go in; they are handed out again while they fit. Each is read by one thread at a time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

__all__ = ["GroupCache"]


class _Entry:
    """A group that is there, or is being read. `value` and `nbytes` are set before `done`, or else `failed`."""

    __slots__ = ("done", "failed", "nbytes", "value")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.failed = False
        self.nbytes = 0
        self.value: Any = None


class GroupCache:
    """Keeps the groups used last, up to `max_bytes`, and the last one read in any case. Thread-safe.

    Groups that callers still hold are not counted once they were put out.
    """

    # Invariant under _lock: `_entries` has the groups, the last used at its end; `nbytes` is the sum of those that are
    # done, and at most `max_bytes` unless only one of these is left.

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, group: int, read: Callable[[], tuple[Any, int]]) -> Any:
        """Return a group.

        Args:
            group: its number.
            read: returns (group, bytes); called in this thread without a lock, where nobody else is reading the group.

        Raises:
            Exception: what `read` raises. Nobody else gets it: those who waited read for themselves.
        """
        while True:
            with self._lock:
                entry = self._entries.get(group)
                mine = entry is None
                if entry is None:
                    entry = self._entries[group] = _Entry()
                else:
                    self._entries.move_to_end(group)
            if mine:
                return self._read(group, entry, read)
            entry.done.wait()
            if not entry.failed:
                return entry.value

    def _read(self, group: int, entry: _Entry, read: Callable[[], tuple[Any, int]]) -> Any:
        try:
            value, nbytes = read()
        except BaseException:
            with self._lock:
                del self._entries[group]
            entry.failed = True
            entry.done.set()
            raise
        with self._lock:
            entry.value, entry.nbytes = value, nbytes
            entry.done.set()
            self.nbytes += nbytes
            for number, other in list(self._entries.items()):
                if self.nbytes <= self.max_bytes:
                    break
                if other is not entry and other.done.is_set():
                    del self._entries[number]
                    self.nbytes -= other.nbytes
        return value
