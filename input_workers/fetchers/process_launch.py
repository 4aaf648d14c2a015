"""A worker process: started in one of three ways, watched by a descriptor, ended and reaped."""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from input_workers.errors import ConfigError
from input_workers.fetchers import StartMethod
from input_workers.fetchers.fork_server import (
    command,
    fill_standard_descriptors,
    fork_server,
    import_path,
    standard_stream,
    worker_environment,
)
from input_workers.fetchers.frames import Link
from input_workers.fetchers.process_child import STACK_SIGNAL, main

__all__ = ["WorkerProcess", "refuse_fork_beside_threads"]


def refuse_fork_beside_threads() -> None:
    """Raise ConfigError if this process has other threads than the calling one.

    What native code has made is not seen: Python knows of such a thread only if it has called Python once, and then for ever.
    """
    ours = [thread for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)]
    others = [thread.name for thread in ours if thread is not threading.current_thread()]
    if others:
        raise ConfigError(
            f"start='fork' while threads run ({', '.join(others[:5])}): a lock that one of them holds would stay locked in "
            "the worker for ever; wanted start='forkserver' or 'spawn', or a start before any thread"
        )


class WorkerProcess:
    """A process that serves requests. Started by the constructor; `end` is its owner's duty. Not thread-safe, but for `link`
    and what says so.

    Attributes:
        pid: of the process.
        link: the parent's end of the pipe.
        ended: a descriptor that is readable when the process has ended; -1 where there is none: the pipe's end says it.
        outputs: what it writes to stdout and stderr comes out of these; their reader closes them.

    Raises:
        OSError: it cannot be started: a limit of processes, memory or descriptors.
    """

    def __init__(self, start: StartMethod, preload: Sequence[str] = ()) -> None:
        opened: list[int] = []
        self.ended = self._life = -1
        self._popen: subprocess.Popen[bytes] | None = None
        self._forked = False
        self.pid = 0
        self.status: int | None = None
        try:
            fill_standard_descriptors()
            ours, theirs = socket.socketpair()
            opened += [ours.fileno(), theirs.fileno()]
            life_read, life_write = os.pipe()
            opened += [life_read, life_write]
            out_read, out_write = os.pipe()
            opened += [out_read, out_write]
            error_read, error_write = os.pipe()
            opened += [error_read, error_write]
            theirs.setblocking(True)  # whatever socket.setdefaulttimeout says
            if start == "forkserver":
                self.pid, self.ended = fork_server.fork([theirs.fileno(), life_read, out_write, error_write], preload)
            elif start == "spawn":
                self._popen = subprocess.Popen(  # noqa: S603  ourselves
                    command("process_child.main", theirs.fileno(), life_read, import_path()),
                    pass_fds=[theirs.fileno(), life_read],
                    stdin=subprocess.DEVNULL,
                    stdout=out_write,
                    stderr=error_write,
                    env=worker_environment(),
                    start_new_session=True,  # Ctrl-C is the parent's
                )
                self.pid = self._popen.pid
                self.ended = os.pidfd_open(self.pid) if hasattr(os, "pidfd_open") else -1
            else:
                self.pid = self._fork(theirs.fileno(), life_read, out_write, error_write)
                self.ended = os.pidfd_open(self.pid) if hasattr(os, "pidfd_open") else -1
        except BaseException:
            if opened:
                ours.detach()
                theirs.detach()
            for descriptor in opened:
                os.close(descriptor)
            if self.pid and self.ended < 0:  # it was started, and cannot be watched
                self.kill()
                self._reap()
            raise
        theirs.close()
        for descriptor in (life_read, out_write, error_write):
            os.close(descriptor)
        self.link = Link(ours)
        self.outputs = out_read, error_read
        self._life = life_write
        _running[id(self)] = self

    def _fork(self, end: int, life: int, stdout: int, stderr: int) -> int:
        pid = os.fork()
        if pid:
            self._forked = True
            return pid
        try:
            gc.freeze()  # what the parent has forgotten must not be closed here, where its numbers have another meaning
            os.setsid()  # Ctrl-C is the parent's
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            kept = sorted((end, life, stdout, stderr))
            for after, before in zip([2, *kept], [*kept, os.sysconf("SC_OPEN_MAX")], strict=True):
                os.closerange(after + 1, before)  # nothing of the parent's
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            os.close(stdout)
            os.close(stderr)
            # Whatever the parent's have buffered is the parent's.
            sys.stdout, sys.stderr = standard_stream(1), standard_stream(2)
            main(end, life, sys.path)
        finally:
            os._exit(1)

    def has_ended(self, timeout_s: float = 0.0) -> bool:
        """Whether the process has ended, waiting for it at most so long."""
        if self.status is not None:
            return True
        if self.ended >= 0:
            poll = select.poll()
            poll.register(self.ended, select.POLLIN)
            if not poll.poll(timeout_s * 1000):
                return False
            self.status = self._reap()
            return True
        deadline = time.monotonic() + timeout_s
        while self._popen is not None:
            if self._popen.poll() is not None:
                self.status = _as_status(self._popen.returncode)
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.005)  # a system that cannot wait for a process with a time limit
        return False

    def _reap(self) -> int:
        if self._popen is not None:
            return _as_status(self._popen.wait())
        try:
            return os.waitpid(self.pid, 0)[1] if self._forked else fork_server.wait(self.pid)
        except OSError:  # the fork server has died before it
            return UNKNOWN

    def show_stacks(self) -> None:
        """Have the process write its stacks to its stderr."""
        self._signal(STACK_SIGNAL)

    def kill(self) -> None:
        """End the process at once; one that is stopped (SIGSTOP), too."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.status is not None:
            return
        try:
            if self.ended >= 0:
                signal.pidfd_send_signal(self.ended, number)
            else:
                os.kill(self.pid, number)
        except ProcessLookupError:
            pass

    def end(self, grace_s: float) -> None:
        """Ask the process to end, kill it if it does not in time, reap it and close what it had. Idempotent."""
        self.link.shut_down()
        if not self.has_ended(grace_s):
            self.kill()
            while not self.has_ended(1.0):
                pass
        _running.pop(id(self), None)
        self.link.close()
        life, self._life = self._life, -1
        ended, self.ended = self.ended, -1
        for descriptor in (life, ended):
            if descriptor >= 0:
                os.close(descriptor)

    def describe_exit(self) -> str:
        """Return how it ended: "was killed by SIGKILL (out of memory?)", "exited with code 3"."""
        status = self.status
        if status is None:
            return "still runs, but has closed its pipe"
        if status == UNKNOWN:
            return "has ended (how, only the fork server knew, which has ended too)"
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            try:
                name = signal.Signals(number).name
            except ValueError:
                name = f"signal {number}"
            return f"was killed by {name}{' (out of memory?)' if number == signal.SIGKILL else ''}"
        return f"exited with code {os.waitstatus_to_exitcode(status)}"


def _forget_in_child() -> None:
    """After a fork of this process: the workers are the parent's, and must notice its end, not this one's."""
    for process in list(_running.values()):
        process.link.close()
        for descriptor in (process._life, process.ended):
            if descriptor >= 0:
                os.close(descriptor)
        process._life = process.ended = -1
        process.status = UNKNOWN
        if process._popen is not None:
            process._popen.returncode = 0  # or it would be missed
    _running.clear()


# All that were started here and not ended; read after a fork, so changed by single calls only.
_running: dict[int, WorkerProcess] = {}
UNKNOWN = -1  # instead of a status

os.register_at_fork(after_in_child=_forget_in_child)


def _as_status(returncode: int) -> int:
    return -returncode if returncode < 0 else returncode << 8
