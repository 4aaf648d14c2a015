"""The loader yields what PyTorch's DataLoader yields, and draws what it draws, for the same arguments and seed."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import pytest
import torch
from adapters.torch_data import Everything, Pair, Random, Remembering, Sharded, assert_same
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

import input_workers as iw

loader = iw.adapters.torch.loader


class Eager:
    """A sampler that draws as soon as it is asked for an iterator, from PyTorch's random numbers."""

    def __iter__(self) -> Any:
        return iter(torch.randperm(23).tolist())


class Lazy:
    """A sampler that draws from NumPy's random numbers for each index; has no length."""

    def __iter__(self) -> Any:
        return (int(np.random.randint(23)) for _ in range(17))


def ragged(items: list[Any]) -> Any:
    """Batches of another shape each: one tensor of all boxes, and where each item's begin; a batch class of the user's."""
    lengths = [item["label"] % 5 for item in items]
    return Pair(torch.cat([torch.full((length, 4), length) for length in lengths]), np.cumsum(lengths)), {"n": len(items)}


def both(arguments: dict[str, Any], more: dict[str, Any], epochs: int = 2, take: int | None = None) -> tuple[Any, Any]:
    """Return what DataLoader and ours yield and draw, from the same seed on."""
    came = []
    for make, extra in ((DataLoader, {}), (loader, more)):
        torch.manual_seed(5)
        np.random.seed(5)
        generator = torch.Generator().manual_seed(7)
        built = {name: value(generator) if name.startswith("make_") else value for name, value in arguments.items()}
        built = {name.removeprefix("make_"): value for name, value in built.items()}
        made = make(**built, **extra)
        seen = []
        for _ in range(epochs):
            iterator = iter(made)
            seen.append([batch for batch, _ in zip(iterator, range(take or 10**6), strict=False)])
            del iterator
            seen.append([torch.rand(1), torch.rand(1, generator=generator), np.random.random()])
        came.append(seen)
    return came[0], came[1]


SAMPLERS = {
    "in order": {},
    "shuffle": {"shuffle": True},
    "shuffle by generator": {"shuffle": True, "make_generator": lambda generator: generator},
    "eager": {"sampler": Eager()},
    "lazy": {"sampler": Lazy()},
    "replacement": {"make_sampler": lambda generator: RandomSampler(range(23), True, 50, generator=generator)},
    "weighted": {"make_sampler": lambda generator: WeightedRandomSampler(range(23), 30, generator=generator)},
    "subset": {"make_sampler": lambda generator: SubsetRandomSampler([3, 5, 9], generator=generator)},
}


@settings(max_examples=40)
@given(
    sampler=st.sampled_from(list(SAMPLERS)),
    batching=st.sampled_from(
        [{"batch_size": 1}, {"batch_size": 4}, {"batch_size": 5, "drop_last": True}, {"batch_size": None}]
    ),
    workers=st.sampled_from([{"num_workers": 0}, {"num_workers": 1}, {"num_workers": 2, "prefetch_factor": 3}]),
    persistent=st.booleans(),
    collate=st.sampled_from([None, ragged]),
    take=st.sampled_from([None, None, 2]),
)
@example("eager", {"batch_size": None}, {"num_workers": 1}, False, None, None)
@example("eager", {"batch_size": None}, {"num_workers": 1}, True, None, None)
@example("lazy", {"batch_size": 2}, {"num_workers": 2, "prefetch_factor": 2}, False, None, 2)
def test_what_dataloader_yields_and_draws(sampler, batching, workers, persistent, collate, take) -> None:
    arguments = {"dataset": Everything(), **SAMPLERS[sampler], **batching}
    if collate is not None and batching["batch_size"] is not None:
        arguments["collate_fn"] = collate
    persistent = persistent and workers["num_workers"] > 0 and not take
    # DataLoader's own workers are processes, and cost seconds: that it draws as many batches ahead, it does in any case.
    theirs, ours = both({**arguments, **workers, "persistent_workers": persistent}, {}, take=take)
    assert_same(ours, theirs)


@pytest.mark.parametrize("collate", [None, ragged])
@pytest.mark.parametrize("persistent", [False, True])
def test_the_same_from_processes(collate, persistent) -> None:
    arguments = {
        "dataset": Everything(), "batch_size": 6, "num_workers": 2, "collate_fn": collate, "persistent_workers": persistent,
        "make_generator": lambda generator: generator, "shuffle": True,
    }  # fmt: skip
    theirs, ours = both(arguments, {"fetchers": "process"})
    assert_same(ours, theirs)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3")
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("arguments", [{"batch_size": 3}, {"batch_size": 4, "drop_last": True}, {"batch_size": None}])
@pytest.mark.parametrize("dataset", [Sharded(), Remembering()], ids=["generator", "own iterator"])
def test_iterable_data_sets_come_from_each_worker_in_turn(dataset, arguments, workers) -> None:
    theirs, ours = both({"dataset": dataset, "num_workers": workers, **arguments}, {})
    assert_same(ours, theirs)


@pytest.mark.parametrize("persistent", [False, True])
def test_iterable_data_sets_in_processes_draw_the_random_numbers_of_dataloaders_workers(persistent) -> None:
    arguments = {"dataset": Sharded(draws=True), "batch_size": 3, "num_workers": 2, "persistent_workers": persistent}
    theirs, ours = both(arguments, {"fetchers": "process"})
    assert_same(ours, theirs)


def test_a_batch_sampler_may_give_batches_of_any_size() -> None:
    batches = [[1], [2, 3, 4], [], [5, 6]]
    arguments = {"dataset": Everything(), "batch_sampler": batches, "collate_fn": list, "num_workers": 2}
    assert_same(*reversed(both(arguments, {})))
    arguments = {"dataset": Everything(), "batch_sampler": BatchSampler(SequentialSampler(range(23)), 4, True)}
    assert_same(*reversed(both(arguments, {})))


def test_random_items_depend_on_seed_epoch_and_batch_alone() -> None:
    came = []
    for workers in (1, 2):
        torch.manual_seed(3)
        made = loader(Random(), 5, num_workers=workers, fetchers="process")
        came.append([list(made), list(made)])
    assert_same(came[0], came[1])
    assert not torch.equal(came[0][0][0][1], came[0][1][0][1])
    assert not torch.equal(came[0][0][0][1], came[0][0][1][1])


def test_it_is_a_dataloader_with_its_length_and_its_errors() -> None:
    made = loader(Everything(), 5, num_workers=2)
    assert isinstance(made, DataLoader)
    assert len(made) == 5
    assert len(iter(made)) == 5
    with pytest.raises(ValueError, match="mutually exclusive"):
        loader(Everything(), shuffle=True, sampler=Eager())
    with pytest.raises(ValueError, match="prefetch_factor"):
        loader(Everything(), prefetch_factor=2)
    with pytest.raises(iw.ConfigError, match="fetchers: got 'fibre'; wanted 'thread'"):
        loader(Everything(), fetchers="fibre")


def test_batches_are_the_trainers_to_hold_and_to_write_to() -> None:
    made = loader(Everything(40), 4, num_workers=2, fetchers="process", persistent_workers=True)
    held = []
    for number, batch in enumerate(made):
        batch["image"] += 100 * number
        held.append(batch)
    for number, batch in enumerate(held):
        wanted = default_collate([Everything()[index] for index in range(4 * number, 4 * number + 4)])
        wanted["image"] += 100 * number
        assert_same(batch, wanted)
    assert collections.Counter(batch["label"].tolist()[0] for batch in made) == dict.fromkeys(range(0, 40, 4), 1)
