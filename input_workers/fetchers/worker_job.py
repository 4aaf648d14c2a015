"""What the worker processes of a run share, and what each of them is sent as its first frame."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from input_workers.fetchers.fork_server import import_path, worker_environment

if TYPE_CHECKING:
    from input_workers.fetchers import Processes
    from input_workers.fetchers.context import FetchContext
    from input_workers.fetchers.worker_output import WorkerOutput

__all__ = ["Job", "WorkerSettings", "die_with_parent", "process_name"]

log = logging.getLogger("input_workers")


@dataclass(slots=True)
class WorkerSettings:
    """What the workers of a run share.

    Attributes:
        context: of the run.
        options: how processes are started.
        fetch: what fetches, pickled by cloudpickle.
        worker_init_fun: called once in each process, pickled too.
        output: passes on what workers print.
    """

    context: FetchContext
    options: Processes
    fetch: bytes
    worker_init_fun: bytes | None
    output: WorkerOutput
    _has_warned: bool = field(default=False, init=False)

    def warn_of_repeated_rows(self, worker_id: int, ending: str) -> None:
        """Warn, once, that a plain function begins anew in another process. Any thread may call this.

        Of a function that is not a Stream, nothing but the lost process knew how far it had come.
        """
        if not self._has_warned:
            self._has_warned = True  # two threads at once would warn twice, which does no harm
            log.warning(
                "source %r, worker %d: %s after it had delivered rows; the fetch function begins anew in another process, "
                "so rows may come twice. A Stream's rows come once: use one, or let the source fail instead, by "
                "fetchers=iw.Processes(restarts=0) and without skip and retries",
                self.context.source, worker_id, ending,
            )  # fmt: skip


class Job:
    """What a worker is for. Sent to it once, as its first frame.

    Made where the worker is started: where it finds modules and files, and its environment, are those of that moment.

    Args:
        settings: shared by all workers.
        worker_id: of this one.

    Attributes:
        fetch: a plain function, or `fetch(rows, request)` of a Stream's plan, pickled by cloudpickle.
        worker_init_fun: called once, with the worker's id, before the first call; pickled too.
        is_stream: whether requests will come, or calls.
        input_names, axes: the inputs, and the batch axis of each.
        packs: small chunks of a plain function may be sent as one.
        policy: what to do when a call fails.
    """

    def __init__(self, settings: WorkerSettings, worker_id: int) -> None:
        context = settings.context
        self.source = context.source
        self.worker_id = worker_id
        self.fetch = settings.fetch
        self.worker_init_fun = settings.worker_init_fun
        self.is_stream: bool = context.calls.is_stream
        self.input_names, self.axes = context.book.input_names, context.book.batch_axes
        self.packs = not self.is_stream and context.assembly.pack_below_nbytes > 0
        # The file is the parent's, who knows what is skipped in all workers.
        self.policy = replace(context.policy, quarantine=None)
        self.path = import_path()
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


# Of the name of a process, the kernel keeps this much.
PROCESS_NAME_BYTES = 15


def process_name(source: str, worker_id: int) -> str:
    """Return the name of a worker process in `ps` and `top`, such as "iw:train/3". A long source's name is cut."""
    number = f"/{worker_id}"
    room = PROCESS_NAME_BYTES - len("iw:") - len(number)
    return f"iw:{source.encode()[:room].decode(errors='ignore')}{number}"


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
