"""Tokens, as many as there are buffers: whoever fills one takes a token, whoever has used it gives the token back.

They are bytes in a pipe that workers open by its name, so one who waits for a token sleeps in the system, and wakes too when
the other end is closed. Where there is no /proc, the pipe has a name in a folder of temporary files.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import weakref
from typing import Any

__all__ = ["BufferTokens", "TokenReader"]


class BufferTokens:
    """The parent's end. Thread-safe; `give` and `close` never wait, so that finalizers may call them.

    Args:
        count: how many tokens there are.

    Raises:
        OSError: no descriptor is left.
    """

    # Invariant under _lock, which is only ever tried: whoever has it writes what is owed, and looks again afterwards.

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._owed: list[bytes] = [bytes(count)]
        self._is_closing = False
        self._folder: str | None = None
        if os.path.isdir(f"/proc/{os.getpid()}/fd"):
            self._ends = list(os.pipe())
            self._paths = [f"/proc/{os.getpid()}/fd/{end}" for end in self._ends]
        else:
            self._folder = tempfile.mkdtemp(prefix="input_workers-")
            path = os.path.join(self._folder, "tokens")
            os.mkfifo(path, 0o600)
            reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            self._ends = [reader, os.open(path, os.O_WRONLY | os.O_CLOEXEC)]
            self._paths = [path, path]
        self._maker = os.getpid()
        self._settle()
        weakref.finalize(self, _close, self._ends, self._folder, self._maker)

    def give(self) -> None:
        """Give a token back. After `close`, and in a fork of the process that made them, it does nothing."""
        if os.getpid() != self._maker:
            return
        self._owed.append(b"\0")
        self._settle()

    def close(self) -> None:
        """Have everybody who waits for a token see the end. Idempotent."""
        self._is_closing = True
        self._settle()

    def _settle(self) -> None:
        while (self._owed or (self._is_closing and self._ends)) and self._lock.acquire(blocking=False):
            try:
                if self._is_closing:
                    self._owed.clear()
                    _close(self._ends, self._folder, self._maker)
                elif self._owed:
                    os.write(self._ends[1], self._owed.pop())
            finally:
                self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenReader, tuple(self._paths)


def _close(ends: list[int], folder: str | None, maker: int) -> None:
    while ends:
        os.close(ends.pop())
    if folder is not None and os.getpid() == maker:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, "tokens"))
            os.rmdir(folder)


class TokenReader:
    """A worker's end. Belongs to one thread.

    Args:
        read_from: the name of the pipe's end that tokens come out of.
        write_to: of the other one.
    """

    def __init__(self, read_from: str, write_to: str) -> None:
        self._read_from = read_from
        self._write_to = write_to
        self._end = -1
        self._has_token = False

    def take(self) -> bool:
        """Wait for a token, unless it is there; False: the parent has closed the pipe."""
        try:
            if self._end < 0:
                self._end = os.open(self._read_from, os.O_RDONLY | os.O_CLOEXEC)
            if not self._has_token:
                self._has_token = bool(os.read(self._end, 1))
        except FileNotFoundError:
            return False
        return self._has_token

    def hand_over(self) -> None:
        """The token goes with the filled buffer to the parent, who will give it back."""
        self._has_token = False

    def give_back(self) -> None:
        """The token, if it is there, is for another one."""
        if self._has_token:
            self._has_token = False
            with contextlib.suppress(OSError):  # nobody wants it any more
                end = os.open(self._write_to, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                try:
                    os.write(end, b"\0")
                finally:
                    os.close(end)
