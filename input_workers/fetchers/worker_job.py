"""What a worker process is for, and where: made in the parent, sent to the worker as its first frame."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
from collections.abc import Sequence

from input_workers.fetchers.fork_server import worker_environment

__all__ = ["Job", "die_with_parent"]


class Job:
    """What a worker is for. Sent to it once, as its first frame.

    Args:
        fetch: a plain function, or `fetch(rows, request)` of a Stream's plan, pickled by cloudpickle.
        worker_init_fun: called once, with the worker's id, before the first call; pickled too.
        worker_id: of this worker.
        is_stream: whether requests will come, or calls.
        axes: the batch axis of each input.
        packs: small chunks of a plain function may be sent as one.

    Made where the worker is started: where it finds modules and files, and its environment, are those of that moment.
    """

    __slots__ = ("axes", "environment", "fetch", "folder", "is_stream", "packs", "path", "worker_id", "worker_init_fun")

    def __init__(
        self,
        fetch: bytes,
        worker_init_fun: bytes | None,
        worker_id: int,
        is_stream: bool,
        axes: Sequence[int],
        packs: bool,
    ) -> None:
        self.fetch = fetch
        self.worker_init_fun = worker_init_fun
        self.worker_id = worker_id
        self.is_stream = is_stream
        self.axes = tuple(axes)
        self.packs = packs
        self.path = list(sys.path)
        self.environment = worker_environment()
        try:
            self.folder = os.getcwd()
        except OSError:  # it was deleted
            self.folder = ""

    def settle(self) -> None:
        """Make this process one of the parent's: a fork server may have been started in another place and environment."""
        sys.path[:] = self.path
        if self.folder:
            with contextlib.suppress(OSError):
                os.chdir(self.folder)
        for name in os.environ.keys() - self.environment.keys():
            del os.environ[name]
        os.environ.update(self.environment)


def die_with_parent(life: int) -> None:
    """Have the kernel kill this process when the parent's end of the silent pipe closes, whatever Python is doing then."""
    if not hasattr(fcntl, "F_SETSIG"):  # not Linux: the closed pipe of requests ends it between two calls
        return
    # A description of its own: signals go to whom the last F_SETOWN on it named.
    own = os.open(f"/proc/self/fd/{life}", os.O_RDONLY | os.O_NONBLOCK)
    os.close(life)
    fcntl.fcntl(own, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(own, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(own, fcntl.F_SETFL, fcntl.fcntl(own, fcntl.F_GETFL) | os.O_ASYNC)
    with contextlib.suppress(BlockingIOError):
        if not os.read(own, 1):  # it was closed before we listened
            os.kill(os.getpid(), signal.SIGKILL)
