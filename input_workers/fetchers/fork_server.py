"""A process without threads that imports NumPy once and forks a worker for each request. Its parent's end, and its own.

Unlike the one of multiprocessing it does not import the parent's main module: a worker has what its function needs, and a
script needs no `if __name__ == "__main__"`.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import reduction
from typing import TextIO

from input_workers.errors import describe
from input_workers.fetchers.frames import receive_descriptors

__all__ = [
    "ForkServer",
    "command",
    "fill_standard_descriptors",
    "fork_server",
    "import_path",
    "serve_forks",
    "set_process_name",
    "standard_stream",
    "worker_environment",
]

# A worker's own threads would share its core with those of the other workers.
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")

FORK, WAIT, PRELOAD = b"f", b"w", b"p"
_DESCRIPTORS = 4  # of a worker: its end of the pipe, the silent pipe, stdout, stderr


# glibc gives the pages of a large array back when it is freed, and a function that makes one for each call spends most of
# its time on getting others: 4.5 ms instead of 1.0 to fill 38 MB. A worker keeps them for its next call.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


def worker_environment() -> dict[str, str]:
    """Return the environment of a worker: ours, with settings for workers where it has none."""
    return {**dict.fromkeys(ONE_THREAD, "1"), **KEEP_FREED_MEMORY, **os.environ}


def import_path() -> list[str]:
    """Return `sys.path` without what is not a string, such as a `pathlib.Path`: an import passes it over, too."""
    return [str(entry) for entry in sys.path if isinstance(entry, str)]


def set_process_name(name: str) -> None:
    """Set what `ps` and `top` call this process, where the system can."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "wb") as file:
        file.write(name.encode())


def fill_standard_descriptors() -> None:
    """Open /dev/null in place of each of stdin, stdout and stderr that is closed.

    The next descriptor that is opened would get its number, and a process that is started would take it for its output.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)


def standard_stream(number: int) -> TextIO:
    """Return stdout (1) or stderr (2) of this process as a new text stream."""
    return open(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


def command(function: str, *arguments: object) -> list[str]:
    """Return the command of a Python like this one that calls `input_workers.fetchers.FUNCTION` with these arguments."""
    module, _, name = function.rpartition(".")
    call = f"{name}({', '.join(map(repr, arguments))})"
    # The path is ours from the beginning, or the package itself might not be found.
    code = f"import sys; sys.path[:] = {import_path()!r}; from input_workers.fetchers.{module} import {name}; {call}"
    return [sys.executable, *subprocess._args_from_interpreter_flags(), "-c", code]  # type: ignore[attr-defined]


class ServerDied(OSError):
    """The fork server is no more."""


class Refused(OSError):
    """The fork server could not do it."""


class ForkServer:
    """The parent's end. Thread-safe; started at the first fork, and again should it have died."""

    # Invariant under _lock: one exchange at a time with the server of this process, which has imported `_loaded`.

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._end: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._loaded: set[str] = set()

    def fork(self, descriptors: Sequence[int], preload: Sequence[str] = ()) -> tuple[int, int]:
        """Fork a worker with these descriptors; return (its pid, a descriptor that is readable when it has ended).

        The server imports the modules of `preload` before, if it has not yet.

        Raises:
            OSError: the worker, or the server, cannot be started.
        """
        with self._lock:
            if self._end is None or self._process is None or self._process.poll() is not None:
                self._start()
            try:
                return self._fork(descriptors, preload)
            except ServerDied:  # since it was last needed
                self._start()
                return self._fork(descriptors, preload)

    def _fork(self, descriptors: Sequence[int], preload: Sequence[str]) -> tuple[int, int]:
        with self._exchange() as end:
            for name in preload:
                if name not in self._loaded:
                    end.sendall(PRELOAD + len(name.encode()).to_bytes(8, "big") + name.encode())
                    self._answer(end)
                    self._loaded.add(name)
            end.sendall(FORK)
            reduction.sendfds(end, list(descriptors))
            pid = self._answer(end)
            try:
                (ended,) = receive_descriptors(end, 1)
            except OSError:  # none left: the worker is of no use
                os.kill(pid, signal.SIGKILL)  # its number is its own until it is waited for
                end.sendall(WAIT + pid.to_bytes(8, "big"))
                self._answer(end)
                raise
            return pid, ended

    def wait(self, pid: int) -> int:
        """Return the status of a worker that has ended, as `os.waitpid` gives it. Raises OSError if its server is gone."""
        with self._lock, self._exchange() as end:
            end.sendall(WAIT + pid.to_bytes(8, "big"))
            return self._answer(end)

    def holds(self) -> tuple[int, int] | None:
        """Return (pid, descriptor) of the server, if there is one."""
        with self._lock:
            return (self._process.pid, self._end.fileno()) if self._process is not None and self._end is not None else None

    def stop(self) -> None:
        """End the server, if there is one. Its workers go on."""
        with self._lock:
            self._stop()

    def forget(self) -> None:
        """After a fork of this process: the server is the parent's."""
        if self._process is not None:
            self._process.returncode = 0  # or it would be missed
        if self._end is not None:
            self._end.close()
        self.__init__()  # type: ignore[misc]

    def _stop(self) -> None:
        end, process = self._end, self._process
        self._end = self._process = None
        if end is not None:
            end.close()
        if process is not None:
            process.wait()

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[socket.socket]:
        """One order and its answer. If it does not come to its end, the next begins with another server."""
        end = self._end
        if end is None:
            raise ServerDied("the fork server has died")
        try:
            yield end
        except Refused:
            raise
        except BaseException as error:
            if getattr(error, "errno", None) == errno.EMFILE:  # the exchange itself has come to its end
                raise
            self._stop()
            if isinstance(error, (EOFError, ConnectionError)):
                raise ServerDied("the fork server has died") from error
            raise

    def _answer(self, end: socket.socket) -> int:
        """Return what the server answers. Raises OSError as it does."""
        size = end.recv(4, socket.MSG_WAITALL)
        if len(size) < 4:
            raise EOFError
        answer = pickle.loads(end.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))  # noqa: S301
        if isinstance(answer, int):
            return answer
        raise Refused(*answer)

    def _start(self) -> None:
        self._stop()
        self._loaded = set()
        fill_standard_descriptors()
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(True)  # whatever socket.setdefaulttimeout says
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


os.register_at_fork(after_in_child=fork_server.forget)
atexit.register(fork_server.stop)  # it would end by itself, but a little later


def serve_forks(number: int) -> None:
    """Be the server, until the parent closes its end."""
    import numpy as np

    from input_workers.fetchers import process_child

    set_process_name("iw:forkserver")
    # The number of a stream that the trainer was started without may be that of any file there, which is not passed on.
    fill_standard_descriptors()
    sys.stdout = sys.stdout or standard_stream(1)
    sys.stderr = sys.stderr or standard_stream(2)
    np.random.default_rng(0)  # what a worker needs first is loaded here, once
    with socket.socket(fileno=number) as end:
        _serve(end, process_child.main)


def _serve(end: socket.socket, main: Callable[[int, int, Sequence[str]], None]) -> None:
    while True:
        order = end.recv(1)
        if order == FORK:
            descriptors = reduction.recvfds(end, _DESCRIPTORS)
            pid = ended = -1
            try:
                pid = os.fork()
                if not pid:
                    end.close()
                    _become_worker(descriptors, main)
                ended = os.pidfd_open(pid)
            except OSError as error:
                if pid > 0:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                _reply(end, (error.errno, f"{error.strerror} (the fork server)"))
            else:
                _reply(end, pid)
                reduction.sendfds(end, [ended])
                os.close(ended)
            for descriptor in descriptors:
                os.close(descriptor)
        elif order == PRELOAD:
            name = end.recv(int.from_bytes(end.recv(8, socket.MSG_WAITALL), "big"), socket.MSG_WAITALL).decode()
            _reply(end, _import(name))
        elif order == WAIT:
            pid = int.from_bytes(end.recv(8, socket.MSG_WAITALL), "big")
            try:
                _reply(end, os.waitpid(pid, 0)[1])
            except ChildProcessError as error:  # another server's
                _reply(end, (error.errno, str(error.strerror)))
        else:
            return


def _import(name: str) -> int | tuple[int, str]:
    try:
        importlib.import_module(name)
    except Exception as error:  # foreign code
        return errno.EINVAL, f"preload: {name!r} cannot be imported: {describe(error)}"
    return 0


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


def _reply(end: socket.socket, value: int | tuple[int | None, str]) -> None:
    content = pickle.dumps(value)
    end.sendall(len(content).to_bytes(4, "big") + content)
