"""How a loader's epochs end: errors are the user's own, workers know who they are, nothing is left behind by any way out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import traceback
from typing import Any

import pytest
import torch
from adapters.torch_data import Everything, Random, Sharded
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

import input_workers as iw

loader = iw.adapters.torch.loader
FETCHERS = ["thread", "process"]


class Odd(ValueError):
    """An exception of the user's, with more than a text."""

    def __init__(self, index: int) -> None:
        super().__init__(f"odd {index}")
        self.index = index

    def __reduce__(self) -> Any:
        return Odd, (self.index,)


class Failing(Dataset):
    def __init__(self, error: Any = Odd, at: int = 11) -> None:
        self.error, self.at = error, at

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        if index == self.at:
            self.fail(index)
        return index

    def fail(self, index: int) -> None:
        raise self.error(index)


class Who(Dataset):
    """Items that say who reads them."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        info = get_worker_info()
        return info.id, info.num_workers, info.seed, type(info.dataset).__name__, os.getpid(), threading.get_ident()


def mark(worker_id: int) -> None:
    info = get_worker_info()
    info.dataset.mark = (worker_id, info.id, info.seed, torch.initial_seed() - worker_id)


class Marked(IterableDataset):
    mark: Any = None

    def __iter__(self) -> Any:
        return iter([self.mark])


def exit_in_worker(index: int) -> Exception:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fetchers", FETCHERS)
def test_an_exception_of_the_data_set_is_raised_as_it_is_after_what_came_before(fetchers, workers) -> None:
    made = loader(Failing(), 2, num_workers=workers, fetchers=fetchers)
    came: list[Any] = []
    with pytest.raises(Odd) as raised:
        came.extend(batch.tolist() for batch in made)
    assert came == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert raised.value.index == 11
    text = "".join(traceback.format_exception(raised.value))
    assert "self.error(index)" in text, "the line that raised it"
    if workers:
        assert any("worker" in note and "request 5" in note for note in raised.value.__notes__)
    assert len([batch for _, batch in zip(range(5), made, strict=False)]) == 5  # another epoch


def test_after_a_failure_the_epoch_says_so() -> None:
    iterator = iter(loader(Failing(at=0), 2, num_workers=1))
    with pytest.raises(Odd):
        next(iterator)
    with pytest.raises(iw.QueueClosed, match="this epoch has failed"):
        next(iterator)


def test_a_stop_iteration_of_an_item_does_not_end_the_epoch_in_silence() -> None:
    with pytest.raises(iw.FetchFailed, match="StopIteration"):
        list(loader(Failing(StopIteration), 2, num_workers=1))


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"collate_fn": lambda items: 1 / 0}, "division"),
        ({"worker_init_fn": lambda worker_id: {}[worker_id]}, "0"),
        ({"sampler": iter([0, 1, 99, 0, 0])}, "99"),
    ],
)
def test_other_code_of_the_users_fails_alike(more, match) -> None:
    class Few(Dataset):
        def __getitem__(self, index: int) -> int:
            return {0: 0, 1: 1}[index]

        def __len__(self) -> int:
            return 2

    with pytest.raises((ArithmeticError, KeyError), match=match):
        list(loader(Few(), 2, num_workers=1, **more))


@pytest.mark.parametrize("fetchers", FETCHERS)
def test_workers_know_who_they_are(fetchers) -> None:
    torch.manual_seed(8)
    base = int(torch.empty((), dtype=torch.int64).random_().item())
    torch.manual_seed(8)
    came = [item for batch in loader(Who(), 1, num_workers=2, fetchers=fetchers) for item in zip(*batch, strict=True)]
    for worker, workers, seed, dataset, process, thread in came:
        assert (int(workers), int(seed), dataset) == (2, base + int(worker), "Who")
        assert (int(process) != os.getpid()) == (fetchers == "process")
        assert int(thread) != threading.get_ident()
    assert get_worker_info() is None


@pytest.mark.parametrize("fetchers", FETCHERS)
def test_worker_init_fn_may_change_the_workers_own_data_set(fetchers) -> None:
    torch.manual_seed(8)
    base = int(torch.empty((), dtype=torch.int64).random_().item())
    torch.manual_seed(8)
    dataset = Marked()
    came = list(loader(dataset, None, num_workers=2, fetchers=fetchers, worker_init_fn=mark))
    for worker, (told, own, seed, initial) in enumerate(came):
        assert (told, own, seed) == (worker, worker, base + worker)
        assert initial == base or fetchers == "thread"  # threads share the process's random numbers
    assert dataset.mark is None


def test_dataloaders_own_workers_are_as_they_were() -> None:
    ours = next(iter(loader(Everything(), 2, num_workers=1)))
    assert not ours["image"].is_shared(), "a file in /dev/shm for each tensor, of which threads have no need"
    batch = next(iter(DataLoader(Everything(), 2, num_workers=1)))
    assert batch["image"].is_shared()
    assert [item[0].tolist() for item in DataLoader(Who(), 6, num_workers=2)] == [[0] * 6, [1] * 6]


@pytest.mark.parametrize("fetchers", FETCHERS)
def test_nothing_is_left_by_a_break_a_drop_or_an_iterator_never_read(fetchers) -> None:
    made = loader(Everything(40), 2, num_workers=2, fetchers=fetchers)
    for _ in made:
        break
    iterator = iter(made)
    next(iterator)
    del iterator
    iter(made)


def test_persistent_workers_are_the_same_ones_and_end_with_the_loader() -> None:
    made = loader(Who(), 1, num_workers=1, fetchers="process", persistent_workers=True)
    processes = {int(batch[4]) for _ in range(2) for batch in made}
    assert len(processes) == 1
    old = iter(made)
    next(old)
    iter(made)
    with pytest.raises(iw.QueueClosed, match="another one has begun"):
        next(old)


@pytest.mark.parametrize("dataset", [Everything(), Sharded(), Failing(at=5)], ids=["indexed", "iterable", "failing"])
def test_what_was_read_ahead_of_a_break_is_not_the_next_epochs(dataset) -> None:
    made = loader(dataset, 1, num_workers=2, collate_fn=str, persistent_workers=True)
    whole = [batch for _, batch in zip(range(5), made, strict=False)]
    for count in (1, 3, 4):
        assert [batch for _, batch in zip(range(count), made, strict=False)] == whole[:count]
    assert [batch for _, batch in zip(range(5), made, strict=False)] == whole


def test_a_dead_worker_is_replaced_but_not_one_that_iterates() -> None:
    with pytest.raises(iw.WorkerDied, match="SIGKILL"):
        list(loader(Failing(exit_in_worker), 2, num_workers=1, fetchers=iw.Processes(restarts=0)))

    class Dying(Sharded):
        def __iter__(self) -> Any:
            yield from range(4)
            os.kill(os.getpid(), signal.SIGKILL)

    came: list[Any] = []
    with pytest.raises(iw.WorkerDied):
        came.extend(batch.tolist() for batch in loader(Dying(), 2, num_workers=1, fetchers="process"))
    assert came in ([[0, 1], [2, 3]], [[0, 1]], [])


def test_a_batch_that_does_not_come_in_time_may_be_asked_for_again() -> None:
    gate = threading.Event()

    class Slow(Random):
        def __getitem__(self, index: int) -> int:
            gate.wait(30.0)
            return index

    iterator = iter(loader(Slow(), 4, num_workers=1, timeout=0.05))
    with pytest.raises(iw.WaitTimeout):
        next(iterator)
    gate.set()
    assert next(iterator).tolist() == [0, 1, 2, 3]
    assert len(list(iterator)) == 4


CTRL_C = """
import os, signal, threading, torch
import input_workers as iw

class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 100
    def __getitem__(self, index):
        if index == 9:
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(2)
        return index

try:
    for batch in iw.adapters.torch.loader(Slow(), 2, num_workers=2):
        print(batch.tolist(), flush=True)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_ends_a_program_that_waits_for_a_batch() -> None:
    done = subprocess.run([sys.executable, "-c", CTRL_C], capture_output=True, text=True, timeout=60)
    assert "interrupted" in done.stdout, done.stderr
    assert done.returncode == 0
