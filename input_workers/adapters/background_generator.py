"""A function that returns an iterator goes in; threads run it ahead of a loop, which gets its items."""

from __future__ import annotations

import os
import queue as queues
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

from input_workers.checks import check_whole
from input_workers.coordinator import exit_hook
from input_workers.errors import ConfigError, FetchFailed, LifecycleError, QueueClosed, describe

__all__ = ["BackgroundGenerator", "BackgroundItems"]

Item = TypeVar("Item")


class ItemQueue(Protocol):
    """What `queue=` must have, as all of the module queue do."""

    def put_nowait(self, item: Any, /) -> None:
        """Add an item, or raise `queue.Full`."""

    def get_nowait(self) -> Any:
        """Take an item, or raise `queue.Empty`."""

    def qsize(self) -> int:
        """Return how many could be taken now."""


class _Shared:
    """What the threads and the loop share. The exit hook holds it while threads run; none of them holds the iterator."""

    # Invariant under _lock: `putting` threads have room for an item and will put it; `at_the_door` is at least the number
    # of threads that wait for a token in `_room`, and `waiting` that of readers who wait for one in `_news`. A token means:
    # look again. What is true is read from the queue itself, so that a Ctrl-C between two steps leaves no count wrong.
    # The finalizer takes no lock, because it may run inside any allocation; a SimpleQueue's put is safe there.

    def __init__(self, items: ItemQueue, bound: int, name: str) -> None:
        self.failure: BaseException | None = None
        self.forked = False
        self.name = name
        self.stopped = False
        self.threads: list[threading.Thread] = []
        self._at_the_door = 0
        self._bound = bound
        self._items = items
        self._lock = threading.Lock()
        self._news: queues.SimpleQueue[None] = queues.SimpleQueue()
        self._pid = os.getpid()
        self._putting = 0
        self._room: queues.SimpleQueue[None] = queues.SimpleQueue()
        self._running = 0
        self._traceback: TracebackType | None = None
        self._waiting = 0

    def start(self, run: Callable[[_Shared], None], count: int) -> None:
        """Start so many threads, or none."""
        self._running = count
        exit_hook.remember(self)
        for number in range(count):
            thread = threading.Thread(target=run, args=(self,), name=f"{self.name}-{number}", daemon=True)
            try:
                thread.start()
            except BaseException:  # no thread is left on this machine, or Ctrl-C
                self.request_stop()
                for _ in range(number, count):
                    self.ended()
                raise
            self.threads.append(thread)

    def request_stop(self) -> None:
        """Have threads and readers end. Takes no lock and may run anywhere."""
        self.stopped = True
        self._room.put(None)
        self._news.put(None)

    def stop(self, deadline: float) -> None:
        """Wait for the threads until `time.monotonic()` reaches the deadline."""
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def put(self, item: Any) -> bool:
        """Put an item when there is room; False: nobody wants it any more. Called by the threads."""
        while not self.stopped:
            with self._lock:
                free = self._items.qsize() + self._putting < self._bound
                if free:
                    self._putting += 1
                else:
                    self._at_the_door += 1
            if free:
                self._put_now(item)
                return True
            self._room.get()
        self._room.put(None)  # for the next thread at the door
        return False

    def _put_now(self, item: Any) -> None:
        try:
            self._items.put_nowait(item)
        except queues.Full:
            raise LifecycleError(
                f"{self.name}: queue: got a full one with {self._items.qsize()} items; wanted a queue that nobody else fills"
            ) from None
        finally:
            with self._lock:
                self._putting -= 1
                if self._waiting:
                    self._waiting -= 1
                    self._news.put(None)

    def take(self) -> Any:
        """Return the next item. Called by readers. Raises StopIteration when all threads have ended."""
        if self._pid != os.getpid():
            raise LifecycleError(f"{self.name}: its threads are those of the process that forked this one; make one here")
        while True:
            self.raise_failure()
            if self.stopped:
                raise QueueClosed(f"{self.name} was closed")
            try:
                item = self._items.get_nowait()
            except queues.Empty:
                pass
            else:
                with self._lock:
                    self._let_one_in()
                return item
            with self._lock:
                if self._items.qsize():
                    continue
                ended = self._running <= 0
                if not ended:
                    self._waiting += 1
                    self._let_one_in()  # whose token a Ctrl-C may have cost
            if ended:
                self.raise_failure()
                raise StopIteration
            self._news.get()
            if self.stopped or self._running <= 0:
                self._news.put(None)  # for the next reader

    def _let_one_in(self) -> None:
        if self._at_the_door:
            self._at_the_door -= 1
            self._room.put(None)

    def fail(self, error: BaseException, thread: str) -> bool:
        """Record an error before anybody can see an end; False: nobody is left to see it."""
        what = f"in thread {thread!r} of {self.name}"
        later = f"later, {what}: {describe(error)}"
        if isinstance(error, StopIteration) or not isinstance(error, Exception):  # to a loop they would be no error
            failed = FetchFailed(f"{self.name}: the generator raised {describe(error)}")
            failed.__cause__ = error
            error = failed
        error.add_note(f"raised {what}")
        with self._lock:
            first = self.failure
            if first is None and self.stopped:
                return False
            if first is None:
                self._traceback, self.failure = error.__traceback__, error
        if first is not None:
            first.add_note(later)
        self.request_stop()
        return True

    def raise_failure(self) -> None:
        """Raise the first error, with the traceback that it came with."""
        if self.failure is not None:
            raise self.failure.with_traceback(self._traceback)

    def ended(self) -> None:
        """A thread has ended."""
        with self._lock:
            self._running -= 1
            last = self._running <= 0  # less, where a Ctrl-C came while a thread was started
        if last:
            self._news.put(None)
            exit_hook.forget(self)


def _run_with(
    generator: Callable[..., Iterable[Any]], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Callable[[_Shared], None]:
    """Return what each thread runs."""

    def run(shared: _Shared) -> None:
        try:
            _run(shared, generator, args, kwargs)
        except BaseException as error:
            if not shared.fail(error, threading.current_thread().name):
                raise  # threading.excepthook shows it
        finally:
            shared.ended()

    return run


def _run(shared: _Shared, generator: Callable[..., Iterable[Any]], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    iterator = iter(generator(*args, **kwargs))
    close = getattr(iterator, "close", None) or (lambda: None)
    try:
        while not shared.stopped:
            try:
                item = next(iterator)
            except StopIteration:
                break
            if not shared.put(item):
                break
            del item  # it is the loop's
    except BaseException as error:
        try:
            close()
        except BaseException as later:
            error.add_note(f"then its close raised {describe(later)}")
        raise
    close()


class BackgroundItems(Generic[Item]):
    """The items of a BackgroundGenerator. Thread-safe: each item goes to one reader. It has no position to go back to."""

    __slots__ = ("__weakref__", "_shared")

    def __init__(self, shared: _Shared) -> None:
        self._shared = shared
        weakref.finalize(self, shared.request_stop).atexit = False

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        """Return the next item, waiting for it.

        Raises:
            StopIteration: all generators have ended, and all their items were returned; so will every later call.
            Exception: what the first generator raised that did; so will every later call.
            FetchFailed: it raised what a loop takes for no error (SystemExit, StopIteration); that is the cause.
            QueueClosed: `close` was called.
            LifecycleError: in a process that was forked.
        """
        return self._shared.take()  # type: ignore[no-any-return]

    def close(self) -> None:
        """Have the threads end, each when its generator next yields. Later and waiting reads raise QueueClosed."""
        self._shared.request_stop()


class BackgroundGenerator(Generic[Item]):
    """Threads that run a generator function ahead of your loop, each from its beginning.

        def frames(path):
            for frame in video(path):
                yield prepared(frame)

        for frame in BackgroundGenerator(frames, prefetch=8, thread_count=1, args=(path,)).iterator():
            ...

    The threads start at once. They share nothing but what the arguments share: with `thread_count=2` and a generator that
    reads a file, each item comes twice; give them a queue or a lock to share work by. Items of one thread come in their
    order. Any object may be an item, None too. The stream ends when all generators have ended.

    An error of a generator is raised at the next item that is asked for, wherever a reader waits; items that waited are
    dropped then, and the other threads end. It is the same exception object, with its traceback, and a note of the thread.

    There is one stream and one iterator: `iterator()` returns the same object as long as somebody holds it. When nobody
    does, or its `close()` was called, the threads end: those that wait for room at once, the others when their generator
    next yields. A generator's `close` is called in its own thread; what it raises then goes to `threading.excepthook`.
    A program that ends waits for generators to yield, up to 5 s.

    Thread-safe. In a forked process reading is LifecycleError.

    Args:
        generator: called in each thread with `args` and `kwargs`; returns an iterator. It should not hold the iterator
            that reads it.
        prefetch: how many items may wait. Each thread holds one more while it waits for room.
        thread_count: threads, and calls of `generator`.
        queue: where items wait, such as a `queue.PriorityQueue`; empty, and used by nobody else meanwhile. Its `maxsize`,
            where it has one, counts instead of `prefetch`. No marker of the end is put in: only items ever are, and those
            that nobody read stay there.
        args: arguments of `generator`.
        kwargs: further ones, by name.

    Raises:
        ConfigError: an argument is wrong.
        RuntimeError: no further thread can be started; none is left running then.
    """

    def __init__(
        self,
        generator: Callable[..., Iterable[Item]],
        prefetch: int = 1,
        thread_count: int = 2,
        queue: ItemQueue | None = None,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not callable(generator):
            raise ConfigError(
                f"BackgroundGenerator: generator: got {type(generator).__qualname__}; wanted a function that returns an "
                "iterator, such as the generator function itself, not yet called"
            )
        for what, value in (("prefetch", prefetch), ("thread_count", thread_count)):
            check_whole(f"BackgroundGenerator: {what}", value, 1)
        bound = prefetch if queue is None else _checked(queue) or prefetch
        name = f"generator-{getattr(generator, '__name__', type(generator).__qualname__)}"
        self._shared = shared = _Shared(queues.SimpleQueue() if queue is None else queue, bound, name)
        shared.start(_run_with(generator, tuple(args or ()), dict(kwargs or {})), thread_count)
        # Held until somebody asks for it; from then on the stream lives as long as they hold it.
        self._unused: BackgroundItems[Item] | None = BackgroundItems(shared)
        self._used = weakref.ref(self._unused)

    def iterator(self) -> BackgroundItems[Item]:
        """Return the iterator over the items; the same one each time.

        Raises:
            Exception: the first error of a generator, as the iterator does.
            LifecycleError: it was dropped, and the stream ended with it.
        """
        items = self._used()
        if items is None:
            self.check_and_raise_error()
            raise LifecycleError(
                f"{self._shared.name}: its iterator was dropped, and the threads ended with it; make a new one"
            )
        self._unused = None
        return items

    def check_and_raise_error(self) -> None:
        """Raise the first error of a generator, if there was one; the same that the iterator raises."""
        self._shared.raise_failure()


def _checked(queue: Any) -> int:
    """Return the bound of somebody's queue, 0 for none."""
    kind = type(queue).__qualname__
    missing = [method for method in ("put_nowait", "get_nowait", "qsize") if not callable(getattr(queue, method, None))]
    if missing or type(queue).__module__ == "multiprocessing.queues":  # there an item that was put cannot be taken at once
        raise ConfigError(f"BackgroundGenerator: queue: got {type(queue).__module__}.{kind}; wanted one of the module queue")
    if queue.qsize():
        raise ConfigError(f"BackgroundGenerator: queue: got a {kind} with {queue.qsize()} items; wanted an empty one")
    return max(0, getattr(queue, "maxsize", 0))
