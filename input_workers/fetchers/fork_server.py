"""A process without threads that imports NumPy once and forks a worker for each request. Its parent's end, and its own.

Unlike the one of multiprocessing it does not import the parent's main module: a worker has what its function needs, and a
script needs no `if __name__ == "__main__"`.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing import reduction

__all__ = ["ForkServer", "command", "fork_server", "serve_forks", "worker_environment"]

# A worker's own threads would share its core with those of the other workers.
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")

FORK, WAIT = b"f", b"w"
_DESCRIPTORS = 4  # of a worker: its end of the pipe, the silent pipe, stdout, stderr


def worker_environment() -> dict[str, str]:
    """Return the environment of a worker: ours, with one thread for each library that is not told otherwise."""
    return {**dict.fromkeys(ONE_THREAD, "1"), **os.environ}


def command(function: str, *arguments: object) -> list[str]:
    """Return the command of a Python like this one that calls `input_workers.fetchers.FUNCTION` with these arguments."""
    module, _, name = function.rpartition(".")
    call = f"{name}({', '.join(map(repr, arguments))})"
    # The path is ours from the beginning, or the package itself might not be found.
    code = f"import sys; sys.path[:] = {sys.path!r}; from input_workers.fetchers.{module} import {name}; {call}"
    return [sys.executable, *subprocess._args_from_interpreter_flags(), "-c", code]  # type: ignore[attr-defined]


class ForkServer:
    """The parent's end. Thread-safe; started at the first fork, and again should it have died."""

    # Invariant under _lock: one exchange at a time with the server of this process.

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._end: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def fork(self, descriptors: Sequence[int]) -> tuple[int, int]:
        """Fork a worker with these descriptors; return (its pid, a descriptor that is readable when it has ended).

        Raises:
            OSError: the worker, or the server, cannot be started.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            end = self._end
            assert end is not None  # noqa: S101  it was started
            end.sendall(FORK)
            reduction.sendfds(end, list(descriptors))
            reply = self._answer()
            if isinstance(reply, str):
                raise OSError(f"the fork server could not start a worker: {reply}")
            (ended,) = reduction.recvfds(end, 1)
            return reply, ended

    def wait(self, pid: int) -> int:
        """Return the status of a worker that has ended, as `os.waitpid` gives it. Raises OSError if the server is gone."""
        with self._lock:
            assert self._end is not None  # noqa: S101  it has forked this worker
            self._end.sendall(WAIT + pid.to_bytes(8, "big"))
            return int(self._answer())

    def stop(self) -> None:
        """End the server, if there is one. Its workers go on."""
        with self._lock:
            if self._end is not None:
                self._end.close()
            if self._process is not None:
                self._process.wait()
            self._end = self._process = None

    def _answer(self) -> int | str:
        assert self._end is not None  # noqa: S101  it was started
        size = self._end.recv(4, socket.MSG_WAITALL)
        if len(size) < 4:
            raise OSError("the fork server has died")
        return pickle.loads(self._end.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))  # type: ignore[no-any-return]  # noqa: S301

    def _start(self) -> None:
        if self._end is not None:
            self._end.close()
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(  # noqa: S603  ourselves
                    command("fork_server.serve_forks", theirs.fileno()),
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=worker_environment(),
                    start_new_session=True,  # Ctrl-C is the parent's
                )
            except BaseException:
                ours.close()
                raise
        self._end = ours


fork_server = ForkServer()


def _forget_in_child() -> None:
    """After a fork of this process: the server is the parent's."""
    global fork_server
    fork_server.__init__()  # type: ignore[misc]


os.register_at_fork(after_in_child=_forget_in_child)


def serve_forks(number: int) -> None:
    """Be the server, until the parent closes its end."""
    import numpy as np

    from input_workers.fetchers import process_child

    np.random.default_rng(0)  # what a worker needs first is loaded here, once
    end = socket.socket(fileno=number)
    while True:
        order = end.recv(1)
        if order == FORK:
            descriptors = reduction.recvfds(end, _DESCRIPTORS)
            try:
                pid = os.fork()
                if not pid:
                    end.close()
                    _become_worker(descriptors, process_child.main)
                reply: int | str = pid
                ended = os.pidfd_open(pid)
            except OSError as error:
                reply, ended = str(error), -1
            for descriptor in descriptors:
                os.close(descriptor)
            _reply(end, reply)
            if ended >= 0:
                reduction.sendfds(end, [ended])
                os.close(ended)
        elif order == WAIT:
            pid = int.from_bytes(end.recv(8, socket.MSG_WAITALL), "big")
            _reply(end, os.waitpid(pid, 0)[1])
        else:
            return


def _become_worker(descriptors: Sequence[int], main: Callable[[int, int, Sequence[str]], None]) -> None:
    try:
        end, life, stdout, stderr = descriptors
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        os.close(stdout)
        os.close(stderr)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        main(end, life, sys.path)
    finally:
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        os._exit(1)


def _reply(end: socket.socket, value: int | str) -> None:
    content = pickle.dumps(value)
    end.sendall(len(content).to_bytes(4, "big") + content)
