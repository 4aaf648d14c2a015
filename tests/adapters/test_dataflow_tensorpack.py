"""tensorpack's own DataFlows as sources, its runners beside ours, and a source under its DataFlows."""

from __future__ import annotations

import collections
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import tqdm
from fetchers.shared_between import CertifiedRows, certified_rows, rows_seen
from gates import HANG_SECONDS, register

import input_workers as iw
from input_workers.adapters import dataflow
from input_workers.adapters.dataflow import SourceDataFlow

IMPORT_SECONDS = 300.0  # worker processes import it too, and TensorFlow with it

pytestmark = pytest.mark.tensorflow  # tensorpack loads it where it is installed


@pytest.fixture(scope="module")
def tp() -> Any:
    import tensorpack.dataflow

    return tensorpack.dataflow


def data_points(count: int) -> list[list[Any]]:
    return [[column[0] for column in certified_rows([number])] for number in range(count)]


def read(coordinator: iw.GlobalCoordinator, fetch: Any, **more: Any) -> list[int]:
    source = register(coordinator, fetch, 7, **{"last_batch": "keep", "timeout_s": IMPORT_SECONDS, **more})
    coordinator.start()
    return [row for batch in source for row in rows_seen(batch)]


@pytest.mark.parametrize("fetchers", ["thread", "process"])
def test_a_list_shuffled_mapped_repeated_and_batched_comes_once_for_each_worker(
    coordinator: iw.GlobalCoordinator, tp: Any, fetchers: str
) -> None:
    df = tp.DataFromList(data_points(40), shuffle=True)
    df = tp.MapData(df, lambda point: point if point[1] % 2 else None)
    df = tp.BatchData(tp.RepeatedData(df, 3), 8, remainder=True)
    seen = read(coordinator, dataflow.fetch(df, batched=True), num_workers=2, fetchers=fetchers)
    assert collections.Counter(seen) == dict.fromkeys(range(1, 40, 2), 6)


def test_workers_have_random_numbers_of_their_own(coordinator: iw.GlobalCoordinator, tp: Any) -> None:
    df = tp.FakeData([(4, 3), (1,)], 50, dtype=["float32", "float64"])
    with pytest.raises(AttributeError):  # its `rng` is made by reset_state
        next(iter(df))
    source = register(coordinator, dataflow.fetch(df), 10, num_workers=3)
    coordinator.start()
    batches = list(source)
    rows = {bytes(row) for batch in batches for row in batch.data}
    assert len(rows) == 150
    assert {(batch.data.shape, batch.data.dtype.str, batch.label.dtype.str) for batch in batches} == {
        ((10, 4, 3), "<f4", "<f8")
    }


def test_the_remainder_that_tensorpack_drops_is_declared_there(coordinator: iw.GlobalCoordinator, tp: Any) -> None:
    """BatchData drops it by default and says nothing; as rows, the source's `last_batch` decides, and its ledger tells."""
    df = tp.DataFromList(data_points(23), shuffle=False)
    assert len(read(coordinator, dataflow.fetch(tp.BatchData(df, 7), batched=True), name="batched")) == 21
    second = iw.GlobalCoordinator()
    source = register(second, dataflow.fetch(df), 7, name="rows")
    with second:
        assert sum(len(batch.data) for batch in source) == 21
        assert source.stats().rows_dropped["final_partial"] == 2


def doubled(point: Any) -> Any:
    return [column[0] for column in certified_rows([point[1] * 2])]


@pytest.mark.parametrize("fetchers", ["thread", "process"])
@pytest.mark.filterwarnings("ignore:isSet:DeprecationWarning")  # in its threads, which else die, and it hangs
def test_map_gives_what_its_strict_threads_give(tp: Any, fetchers: str) -> None:
    df = tp.DataFromList(data_points(300), shuffle=True)
    theirs = tp.MultiThreadMapData(df, 3, doubled, buffer_size=50, strict=True)
    theirs.reset_state()
    wanted = [sorted(int(label) for _, label in theirs) for _ in range(2)]
    for thread in theirs._threads:
        thread.stop()
    for thread in theirs._threads:
        thread.join(HANG_SECONDS)
    ours = dataflow.map(df, doubled, 3, fetchers=fetchers)
    assert len(ours) == len(theirs) == 300
    ours.reset_state()
    assert [sorted(int(label) for _, label in ours) for _ in range(2)] == wanted
    batches = tp.BatchData(tp.RepeatedData(ours, 2), 60)  # under its DataFlows
    batches.reset_state()
    labels = [int(label) for _, column in batches for label in column]
    assert sorted(labels) == sorted(wanted[0] * 2)
    assert labels[:300] != labels[300:], "it shuffles each time anew"


RUNNER = """
import json, sys
import tensorpack.dataflow as tp
df = tp.MultiProcessRunnerZMQ(tp.DataFromList([[n] for n in range(50)], shuffle=True), 2)
df.reset_state()
seen = []
while len(seen) < 200:
    seen += [point[0] for point in df]
sys.stdout.write("\\nseen " + json.dumps(seen) + "\\n")
"""


def test_workers_give_the_distribution_that_its_processes_give(coordinator: iw.GlobalCoordinator, tp: Any) -> None:
    """Two workers that iterate all of it each, mixed: every data point comes as often, but for what is under way."""
    done = subprocess.run([sys.executable, "-c", RUNNER], capture_output=True, timeout=120, check=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("seen ")]
    theirs = collections.Counter(json.loads(lines[0].removeprefix("seen ")))
    df = tp.RepeatedData(tp.DataFromList(data_points(50), shuffle=True), -1)
    source = register(coordinator, dataflow.fetch(df), 50, num_workers=2)
    coordinator.start()
    ours = collections.Counter(row for _, batch in zip(range(4), source, strict=False) for row in rows_seen(batch))
    for counted in (theirs, ours):
        assert sum(counted.values()) == 200
        assert set(counted) <= {*range(50)}
        assert max(counted.values()) - min(counted[number] for number in range(50)) <= 8


def test_a_function_that_fails_in_a_worker_is_an_error_with_its_cause(coordinator: iw.GlobalCoordinator, tp: Any) -> None:
    """Where its `_recv` waits for a thread that has died."""

    def broken(point: Any) -> Any:
        raise OSError("disk gone")

    df = dataflow.map(tp.DataFromList(data_points(300)), broken, 3)
    with pytest.raises(iw.FetchFailed) as caught:
        read(coordinator, dataflow.fetch(df))
    assert isinstance(caught.value.__cause__, OSError)


def test_a_source_is_a_dataflow_for_its_dataflows(
    coordinator: iw.GlobalCoordinator, tp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = iw.Stream(CertifiedRows(40), shuffle=True, epochs=None, epoch_end="break")
    source = SourceDataFlow(register(coordinator, stream, 5, num_workers=2), rows=True)
    coordinator.start()
    df = tp.MapData(tp.BatchData(tp.RepeatedData(source, 2), 16), lambda point: [point[0] * 2, point[1]])
    assert len(df) == 5
    df.reset_state()
    points = list(df)
    labels = np.concatenate([label for _, label in points])
    assert collections.Counter(labels.tolist()) == dict.fromkeys(range(40), 2)
    for data, label in points:
        assert (data == certified_rows(label)[0] * 2).all()
    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)  # it has a thread of its own, for ever
    tp.TestDataSpeed(tp.RepeatedData(source, -1), size=100, warmup=20).start()


def test_ragged_data_points_are_an_error(coordinator: iw.GlobalCoordinator, tp: Any) -> None:
    df = tp.DataFromList([[np.zeros(length), 0] for length in (3, 3, 4)], shuffle=False)
    with pytest.raises(iw.FetchFailed) as caught:
        read(coordinator, dataflow.fetch(df))
    assert isinstance(caught.value.__cause__, iw.SpecMismatch)
    assert "'component 0', row 2: got dtype('float64') of shape (4,)" in str(caught.value.__cause__)
