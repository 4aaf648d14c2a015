"""What workers print: bytes come out of their pipes, whole lines, marked with the worker, go to our stdout and stderr."""

from __future__ import annotations

import collections
import math
import os
import selectors
import sys
import threading
import time
from collections.abc import Sequence

from input_workers.lifecycle import seconds_left

__all__ = ["Printed", "WorkerOutput"]

# Kept of what a worker wrote last to stderr, for the error that tells of its death.
TAIL_CHARS = 4000
TAIL_LINES = 50
READ_BYTES = 64 * 1024
# A line longer than this is passed on in pieces.
MAX_LINE_BYTES = 64 * 1024


class Printed:
    """What one process prints.

    Args:
        mark: begins each of its lines.
    """

    # Written by the thread that passes it on, but for what `tail` reads: a deque and an event.

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self.open_pipes = 2
        self._last: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        self._drained = threading.Event()

    def tail(self, timeout_s: float) -> str:
        """Return what the process, which has ended, wrote last to stderr, waiting at most so long for the rest of it."""
        self._drained.wait(timeout_s)
        return "\n".join(self._last.copy())[-TAIL_CHARS:]

    def pipe_ended(self) -> None:
        """One of stdout and stderr has."""
        self.open_pipes -= 1
        if not self.open_pipes:
            self._drained.set()

    def pass_on(self, is_error: bool, data: bytes, at_end: bool) -> bytes:
        """Write the whole lines; return what is left."""
        *lines, left = data.split(b"\n")
        if left and (at_end or len(left) > MAX_LINE_BYTES):
            lines.append(left)
            left = b""
        if lines:
            texts = [line.decode("utf-8", "replace") for line in lines]
            if is_error:
                self._last.extend(text[:TAIL_CHARS] for text in texts[-TAIL_LINES:])
            target = sys.stderr if is_error else sys.stdout
            try:
                target.write("".join(f"{self.mark}{text}\n" for text in texts))
                target.flush()
            except (OSError, ValueError, AttributeError):  # closed, or none: there is nowhere to say it
                pass
        return left


class WorkerOutput:
    """Passes on what all workers of a source print, in a thread of its own: a flood holds up nobody but its worker.

    It must be stopped if `add` was called.
    """

    # Invariant under _lock: `_new` are pipes that the thread has not taken over yet; it closes every pipe it was given.

    def __init__(self, source: str) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._new: list[tuple[int, Printed, bool]] = []
        self._wake_read = self._wake_write = -1
        self._closed = False
        self._deadline = math.inf  # finite when the workers have ended
        self.thread = threading.Thread(target=self._run, name=f"output-{source}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    def add(self, worker_id: int, outputs: Sequence[int]) -> Printed:
        """Pass on what comes out of (stdout, stderr) of a worker's process, until both end. Raises OSError."""
        printed = Printed(f"[{self._source}/{worker_id}] ")
        with self._lock:
            if self._closed:
                for pipe in outputs:
                    os.close(pipe)
                return printed
            try:
                if self._wake_write < 0:
                    self._wake_read, self._wake_write = os.pipe()
                    os.set_blocking(self._wake_read, False)
            except OSError:
                for pipe in outputs:
                    os.close(pipe)
                raise
            self._new += [(outputs[0], printed, False), (outputs[1], printed, True)]
            os.write(self._wake_write, b"+")
        return printed

    def stop(self, deadline: float) -> list[threading.Thread]:
        """End the thread once the pipes of the workers, which have ended, are empty; return it if it has not."""
        self._deadline = deadline
        if not self.thread.ident:
            self._close()
            return []
        with self._lock:
            if self._wake_write >= 0:
                os.write(self._wake_write, b"+")
        if threading.current_thread() is not self.thread:
            self.thread.join(seconds_left(deadline))
        return [self.thread] if self.thread.is_alive() else []

    def _run(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._wake_read, selectors.EVENT_READ, None)
        rest: dict[int, bytes] = {}
        try:
            while True:
                # When the run ends, its workers have: what is in the pipes is all that comes. A grandchild may hold one open.
                ending = self._deadline != math.inf
                ready = selector.select(0 if ending else None)
                if ending and (not ready or time.monotonic() > self._deadline):
                    break
                for key, _ in ready:
                    if key.data is None:
                        self._take_over(selector, rest)
                        continue
                    printed, is_error = key.data
                    data = os.read(key.fd, READ_BYTES)
                    rest[key.fd] = printed.pass_on(is_error, rest[key.fd] + data, at_end=not data)
                    if not data:
                        selector.unregister(key.fd)
                        os.close(key.fd)
                        del rest[key.fd]
                        printed.pipe_ended()
        finally:
            for key in list(selector.get_map().values()):
                if key.data is not None:
                    key.data[0].pass_on(key.data[1], rest[key.fd], at_end=True)
                    os.close(key.fd)
            selector.close()
            self._close()

    def _take_over(self, selector: selectors.BaseSelector, rest: dict[int, bytes]) -> None:
        """Watch the pipes that have come."""
        os.read(self._wake_read, 4096)
        with self._lock:
            new, self._new = self._new, []
        for pipe, printed, is_error in new:
            selector.register(pipe, selectors.EVENT_READ, (printed, is_error))
            rest[pipe] = b""

    def _close(self) -> None:
        with self._lock:
            self._closed = True
            for pipe, _, _ in self._new:
                os.close(pipe)
            self._new = []
            for end in (self._wake_read, self._wake_write):
                if end >= 0:
                    os.close(end)
            self._wake_read = self._wake_write = -1
