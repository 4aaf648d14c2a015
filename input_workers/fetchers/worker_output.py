"""What workers print: bytes come out of their pipes, whole lines, marked with the worker, go to our stdout and stderr."""

from __future__ import annotations

import collections
import os
import selectors
import sys
import threading
from collections.abc import Sequence

from input_workers.lifecycle import seconds_left

__all__ = ["WorkerOutput"]

# Kept of what a worker wrote last to stderr, for the error that tells of its death.
TAIL_CHARS = 4000
READ_BYTES = 64 * 1024
# A line longer than this is passed on in pieces.
MAX_LINE_BYTES = 64 * 1024


class WorkerOutput:
    """Passes on what all workers of a source print, in a thread of its own: a flood holds up nobody but its worker."""

    # Invariant under _lock: `_new` are pipes that the thread has not taken over yet; it closes every pipe it was given.

    def __init__(self, source: str) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._new: list[tuple[int, int, bool]] = []
        self._tails: dict[int, collections.deque[str]] = {}
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        self._ending = False
        self.thread = threading.Thread(target=self._run, name=f"output-{source}", daemon=True)
        self._drained: dict[int, threading.Event] = {}

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    def add(self, worker_id: int, outputs: Sequence[int]) -> None:
        """Pass on what comes out of (stdout, stderr) of a worker, until both end."""
        with self._lock:
            self._drained[worker_id] = threading.Event()
            self._new += [(outputs[0], worker_id, False), (outputs[1], worker_id, True)]
            self._wake()

    def tail(self, worker_id: int, timeout_s: float) -> str:
        """Return what a worker that has ended wrote last to stderr, waiting at most so long for the rest of it."""
        drained = self._drained.get(worker_id)
        if drained is not None:
            drained.wait(timeout_s)
        return "\n".join(self._tails.get(worker_id, ()))[-TAIL_CHARS:]

    def stop(self, deadline: float) -> list[threading.Thread]:
        """End the thread once the pipes of the workers, which have ended, are empty; return it if it has not."""
        self._ending = True
        if not self.thread.ident:
            self._close()
            return []
        with self._lock:
            self._wake()
        if threading.current_thread() is not self.thread:
            self.thread.join(seconds_left(deadline))
        return [self.thread] if self.thread.is_alive() else []

    def _wake(self) -> None:
        """Have the thread look again. The lock is held."""
        if self._wake_write >= 0:
            os.write(self._wake_write, b"+")

    def _run(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._wake_read, selectors.EVENT_READ, None)
        rest: dict[int, bytes] = {}
        open_pipes: dict[int, int] = collections.Counter()
        try:
            while not self._ending or rest:
                # When the run ends, its workers have: what is in the pipes is all that comes. A grandchild may hold one open.
                ready = selector.select(0 if self._ending else None)
                if self._ending and not any(key.data for key, _ in ready):
                    break
                for key, _ in ready:
                    if key.data is None:
                        try:
                            os.read(self._wake_read, 4096)
                        except BlockingIOError:
                            pass
                        with self._lock:
                            new, self._new = self._new, []
                        for pipe, worker_id, is_error in new:
                            selector.register(pipe, selectors.EVENT_READ, (worker_id, is_error))
                            rest[pipe] = b""
                            open_pipes[worker_id] += 1
                        continue
                    worker_id, is_error = key.data
                    data = os.read(key.fd, READ_BYTES)
                    rest[key.fd] = self._pass_on(worker_id, is_error, rest[key.fd] + data, at_end=not data)
                    if not data:
                        selector.unregister(key.fd)
                        os.close(key.fd)
                        del rest[key.fd]
                        open_pipes[worker_id] -= 1
                        if not open_pipes[worker_id]:
                            self._drained[worker_id].set()
        finally:
            for pipe in rest:
                os.close(pipe)
            selector.close()
            self._close()

    def _close(self) -> None:
        with self._lock:
            for pipe, _, _ in self._new:
                os.close(pipe)
            self._new = []
            for end in (self._wake_read, self._wake_write):
                if end >= 0:
                    os.close(end)
            self._wake_read = self._wake_write = -1

    def _pass_on(self, worker_id: int, is_error: bool, data: bytes, at_end: bool) -> bytes:
        """Write the whole lines; return what is left."""
        *lines, left = data.split(b"\n")
        if left and (at_end or len(left) > MAX_LINE_BYTES):
            lines.append(left)
            left = b""
        if lines:
            texts = [line.decode("utf-8", "replace") for line in lines]
            if is_error:
                tail = self._tails.setdefault(worker_id, collections.deque(maxlen=50))
                tail.extend(text[:TAIL_CHARS] for text in texts)
            target = sys.stderr if is_error else sys.stdout
            try:
                target.write("".join(f"[{self._source}/{worker_id}] {text}\n" for text in texts))
                target.flush()
            except (OSError, ValueError, AttributeError):  # closed, or none: there is nowhere to say it
                pass
        return left
