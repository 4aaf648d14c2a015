"""What a test shares with functions that run in other processes: by a file, or a socket, whose name travels with them."""

from __future__ import annotations

import fcntl
import itertools
import os
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
from self_certifying import make_chunk

import input_workers as iw

HANG_SECONDS = 30.0
_numbers = itertools.count()


class FileCounter:
    """Counts in a file, whoever counts. A process that dies while it counts holds up nobody."""

    def __init__(self, path: Path, start: int = 0) -> None:
        self._path = str(path)
        Path(self._path).write_text(str(start))

    def add(self) -> int:
        """Count; return the number before."""
        with open(self._path, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            value = int(file.read() or 0)
            file.seek(0)
            file.write(str(value + 1))
        return value

    @property
    def value(self) -> int:
        return int(Path(self._path).read_text())


class Door:
    """Calls knock, wherever they run, and wait until the test, which sees who knocks, lets them go on."""

    def __init__(self) -> None:
        self.address = f"\0input-workers-door-{os.getpid()}-{next(_numbers)}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.address)
        self._listener.listen(128)
        self._listener.settimeout(HANG_SECONDS)
        self._inside: list[socket.socket] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Knocker, (self.address,)

    def await_knock(self) -> tuple[int, str]:
        """Wait for the next one; return (its process, what it says). It waits for `open`, or until its process ends."""
        call, _ = self._listener.accept()
        self._inside.append(call)
        call.settimeout(HANG_SECONDS)
        pid, _, text = call.recv(1000).decode().partition(" ")
        return int(pid), text

    def open(self, answer: str = "go on") -> None:
        """Let all go on that have knocked."""
        for call in self._inside:
            try:
                call.sendall(answer.encode())
            except OSError:  # it has died
                pass
            call.close()
        self._inside.clear()

    def close(self) -> None:
        """Whoever knocks now, or has, gets an error."""
        self.open()
        self._listener.close()


class Knocker:
    """The other side of a Door."""

    def __init__(self, address: str) -> None:
        self.address = address

    def knock(self, text: str = "") -> str:
        """Tell the test, and wait for its answer."""
        with socket.socket(socket.AF_UNIX) as call:
            call.connect(self.address)
            call.sendall(f"{os.getpid()} {text}".encode())
            return call.recv(100).decode()

    def wait(self, timeout_s: float) -> None:
        """Wait for the others, at a Barrier."""
        self.knock()


class Barrier:
    """Lets so many go on together."""

    def __init__(self, parties: int) -> None:
        door = Door()
        self.address = door.address

        def serve() -> None:
            for _ in range(parties):
                door.await_knock()
            door.close()

        threading.Thread(target=serve, daemon=True).start()

    def __reduce__(self) -> tuple[Any, ...]:
        return Knocker, (self.address,)


class CertifiedRows:
    """A sized source of self-certifying rows: a row depends on its number alone. `before(request)` comes before each call."""

    def __init__(self, rows: int, before: Any = None, width: int = 1) -> None:
        self.rows, self.before, self.width = rows, before, width

    def __len__(self) -> int:
        return self.rows

    def fetch(self, rows: Any, request: Any) -> Any:
        if self.before is not None:
            self.before(request)
        return certified_rows(rows, self.width)


def certified_rows(rows: Any, width: int = 1) -> list[Any]:
    """Return, for each row number, the number and what proves it, `width` times."""
    numbers = np.asarray(rows, np.int64)
    data = np.repeat(numbers[:, None] * 1_000_003 ^ 0x5A5A5A, width, axis=1)
    return [data, numbers]


def rows_seen(batch: Any) -> list[int]:
    """Check that no row of a batch is torn; return the row numbers."""
    data, numbers = certified_rows(batch.label, batch.data.shape[1])
    assert (batch.data == data).all(), "torn"
    return [int(number) for number in numbers]


def endless(worker_id: int, batch_size: int) -> Any:
    """A plain function without an end."""
    return make_chunk(worker_id, 0, batch_size)


def nothing_more(worker_id: int, batch_size: int) -> Any:
    """A plain function without data."""
    raise iw.EndOfData
