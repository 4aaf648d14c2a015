"""A generator that prepares frames, two of it in threads, ahead of the loop that uses them."""

import threading
from collections.abc import Iterator

import numpy as np

from input_workers.adapters import BackgroundGenerator

numbers = iter(range(200))  # shared: each thread takes the next one
lock = threading.Lock()


def frames(size: int) -> Iterator[tuple[int, np.ndarray]]:
    while True:
        with lock:
            number = next(numbers, None)
        if number is None:
            return
        yield number, np.sort(np.random.default_rng(number).random((size, size)))  # the work, which runs beside the loop


seen = set()
for number, _frame in BackgroundGenerator(frames, prefetch=8, thread_count=2, args=(100,)).iterator():
    seen.add(number)
print(f"{len(seen)} frames, each once: {seen == set(range(200))}")
