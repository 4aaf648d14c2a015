"""A loader that is saved within an epoch yields exactly the rest of it in another program, and the same epochs after it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from adapters.torch_data import Everything, Random, Remembering, Sharded, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import RandomSampler, WeightedRandomSampler

import input_workers as iw

loader = iw.adapters.torch.loader


class Counting:
    """A sampler that goes on from epoch to epoch, and knows where it is."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Any:
        self.epoch += 1
        return iter([(index * self.epoch) % 23 for index in range(23)])

    def __len__(self) -> int:
        return 23

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]


MAKERS = {
    "shuffle": lambda seed: {"shuffle": True},
    "generator": lambda seed: {"shuffle": True, "generator": torch.Generator().manual_seed(seed)},
    "sampler's generator": lambda seed: {
        "sampler": RandomSampler(range(23), True, 40, generator=torch.Generator().manual_seed(seed))
    },
    "weighted": lambda seed: {"sampler": WeightedRandomSampler(range(1, 24), 30)},
    "stateful": lambda seed: {"sampler": Counting()},
    "in order": lambda seed: {},
}


@settings(max_examples=40)
@given(
    maker=st.sampled_from(list(MAKERS)),
    workers=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    persistent=st.booleans(),
    before=st.integers(0, 8),
)
def test_the_rest_of_the_epoch_and_those_after_it(maker, workers, persistent, before) -> None:
    def make(seed: int, workers: int) -> Any:
        more = MAKERS[maker](seed)
        return loader(Everything(), 3, num_workers=workers, persistent_workers=persistent and workers > 0, **more)

    torch.manual_seed(1)
    one = make(1, workers[0])
    first, second = [], []  # what is left of the epoch that is saved, and the one after the first
    state = one.state_dict()
    for number, batch in enumerate(one, 1):
        first.append(batch)
        if number == before:
            state, first = json.loads(json.dumps(one.state_dict())), []
    if maker not in ("shuffle", "weighted"):  # there another epoch draws from the numbers of the program
        second = list(one)

    torch.manual_seed(99 if before else 1)
    other = make(2, workers[1])
    other.load_state_dict(state)
    assert other.state_dict() == state
    drawn = torch.get_rng_state()
    assert_same(list(other), first)
    if before:
        assert torch.equal(torch.get_rng_state(), drawn)  # what is run again disturbs nobody
    if second:
        assert_same(list(other), second)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("dataset", [Sharded(), Remembering()], ids=["skipped", "with a state of its own"])
@pytest.mark.parametrize("before", [0, 1, 4, 7, 9])
def test_the_rest_of_an_iterable_data_set(dataset, before, workers) -> None:
    def make() -> Any:
        return loader(type(dataset)(), 4, num_workers=workers)

    one = make()
    iterator = iter(one)
    is_over = len([batch for _, batch in zip(range(before), iterator, strict=False)]) < before
    state = json.loads(json.dumps(one.state_dict()))
    wanted = list(make() if is_over else iterator)
    other = make()
    other.load_state_dict(state)
    assert_same(list(other), wanted)
    assert_same(list(other), list(make()))


def test_a_data_set_with_a_state_is_not_read_again() -> None:
    reads: list[int] = []

    class Noting(Remembering):
        def __next__(self) -> int:
            reads.append(self.at)
            return super().__next__()

    one = loader(Noting(), 4)
    iterator = iter(one)
    for _ in range(5):
        next(iterator)
    state = one.state_dict()
    other = loader(Noting(), 4)
    other.load_state_dict(state)
    reads.clear()
    assert next(iter(other)).tolist() == [20, 21, 22, 23]
    assert reads == [20, 21, 22, 23]


@pytest.mark.parametrize("dataset", [Random(), Remembering()], ids=["indexed", "iterable"])
def test_processes_resume_with_their_random_numbers(dataset) -> None:
    torch.manual_seed(4)
    one = loader(dataset, 4, num_workers=2, fetchers="process", shuffle=True if isinstance(dataset, Random) else None)
    iterator = iter(one)
    for _ in range(2):
        next(iterator)
    state = json.loads(json.dumps(one.state_dict()))
    wanted = list(iterator)
    torch.manual_seed(77)
    other = loader(dataset, 4, num_workers=2, fetchers="process", shuffle=True if isinstance(dataset, Random) else None)
    other.load_state_dict(state)
    assert_same(list(other), wanted)


def test_a_state_that_does_not_fit_is_an_error_and_changes_nothing() -> None:
    one = loader(Sharded(), 4, num_workers=2)
    state = one.state_dict()
    other = loader(Sharded(), 4, num_workers=1)
    with pytest.raises(iw.StateMismatch, match="workers_of = 2; wanted 1"):
        other.load_state_dict(state)
    with pytest.raises(iw.StateMismatch, match="format = None; wanted 1"):
        other.load_state_dict({})
    assert len(list(other)) == 6
