"""tf.data datasets over sources, and sources over datasets."""

import gc
import pathlib
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
from self_certifying import Witness, check_batch, make_chunk

import input_workers as iw

tf = pytest.importorskip("tensorflow")

pytestmark = pytest.mark.tensorflow

ROWS = 12


class OwnError(Exception):
    """Of a user's."""


def chunks(calls, rows=7, after=None):
    """Return a fetch function: so many chunks of certified rows for each worker, then the end, or an error."""
    count = {}

    def fetch(worker_id, batch_size):
        call = count[worker_id] = count.get(worker_id, -1) + 1
        if call == calls:
            raise after or iw.EndOfData
        return make_chunk(worker_id, call, rows)

    return fetch


def started(coordinator, fetch, feed="numpy", names=("data", "label"), workers=1, **more):
    iw.init_data_input_workers(feed, list(names), fetch, ROWS, workers, coordinator=coordinator, **more)
    coordinator.start()
    return coordinator["train"]


@pytest.mark.parametrize("feed", ["numpy", "tensorflow:/CPU:0"])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_batch_comes_once_and_as_it_was(coordinator, feed, workers):
    source = started(coordinator, chunks(40), feed, workers=workers)
    witness = Witness()
    for batch in iw.adapters.tf_data.dataset(source).prefetch(4):
        assert type(batch).__name__ == "Batch"
        witness.see([batch.data.numpy(), batch.label.numpy()], ROWS)
    assert witness.rows == max(workers, 1) * 40 * 7 // ROWS * ROWS


def test_what_is_prefetched_or_kept_never_changes(coordinator):
    source = started(coordinator, chunks(3000, rows=ROWS), max_buffered_batches=2, device_queue_depth=1)
    kept = []
    for number, batch in enumerate(iw.adapters.tf_data.dataset(source).prefetch(16)):
        if number % 5 == 0:
            kept.append((number, batch))
        if len(kept) > 20:
            call, batch = kept.pop(0)
            assert (check_batch([batch.data.numpy(), batch.label.numpy()], ROWS)[:, 2] == call).all()
    assert number == 2999


@pytest.mark.parametrize(
    ("more", "rows"),
    [({}, ROWS), ({"last_batch": "pad"}, ROWS), ({"last_batch": "keep"}, None), ({"rebatch": False}, None)],
)
def test_the_static_shape_has_the_batch_size_where_every_batch_has_it(coordinator, more, rows):
    source = started(coordinator, chunks(3), **more)
    batches = iw.adapters.tf_data.dataset(source)
    assert batches.element_spec.data == tf.TensorSpec((rows, 7), tf.int64)
    seen = [len(batch.data) for batch in batches]
    assert sum(seen) == {"drop": 12, "pad": 24, "keep": 21}[more.get("last_batch", "keep" if "rebatch" in more else "drop")]


def test_the_batch_axis_and_row_shapes_are_in_the_element_spec(coordinator):
    def fetch(worker_id, batch_size):
        return [np.zeros((3, 5, 4), np.float16), np.zeros(5, bool)]

    source = started(coordinator, fetch, batch_axes=(1, 0))
    spec = iw.adapters.tf_data.dataset(source).element_spec
    assert spec == type(spec)(tf.TensorSpec((3, ROWS, 4), tf.float16), tf.TensorSpec((ROWS,), tf.bool))


def test_an_epoch_an_iteration(coordinator):
    stream = iw.Stream(iw.sources.Arrays(np.arange(36)), epochs=3, epoch_end="break")
    source = started(coordinator, stream, names=["number"], ordered=True)
    batches = iw.adapters.tf_data.dataset(source)
    for _ in range(3):
        assert [batch.number.numpy().tolist() for batch in batches] == np.arange(36).reshape(3, ROWS).tolist()


@pytest.mark.parametrize("wrap", [lambda it: it, lambda it: it.map(lambda batch: batch.data).prefetch(2).take(10**6),
                                  lambda it: it.unbatch().batch(5).shuffle(3).repeat(2)])  # fmt: skip
def test_the_users_error_is_raised_as_itself(coordinator, wrap):
    error = OwnError("disk on fire")
    source = started(coordinator, chunks(4, rows=ROWS, after=error))
    with pytest.raises(iw.FetchFailed, match="worker 0") as caught:
        list(wrap(iw.adapters.tf_data.dataset(source)))
    assert caught.value.__cause__ is error


def test_other_errors_of_a_pipeline_stay_what_they_are(coordinator):
    source = started(coordinator, chunks(4))
    batches = iw.adapters.tf_data.dataset(source).map(
        lambda batch: tf.debugging.check_numerics(tf.cast(batch.data, tf.float32) / 0.0, "odd")
    )
    with pytest.raises(tf.errors.InvalidArgumentError):
        next(iter(batches))


def test_what_went_wrong_in_an_earlier_iteration_is_not_said_again(coordinator):
    go_on = threading.Event()

    def fetch(worker_id, batch_size):
        assert go_on.wait(30)
        return make_chunk(worker_id, 0, ROWS)

    specs = [iw.ArraySpec(array.shape[1:], array.dtype) for array in make_chunk(0, 0, 1)]
    source = started(coordinator, fetch, specs=specs, timeout_s=0.01)
    batches = iw.adapters.tf_data.dataset(source).map(
        lambda batch: tf.debugging.check_numerics(tf.cast(batch.data, tf.float32) / 0.0, "no number")
    )
    with pytest.raises(iw.WaitTimeout):
        next(iter(batches))
    go_on.set()
    source.next_batch(30.0)
    with pytest.raises(tf.errors.InvalidArgumentError):
        next(iter(batches))


def test_where_tensorflow_iterates_the_error_is_raised_as_itself_too(coordinator):
    error = OwnError("disk on fire")
    batches = iw.adapters.tf_data.dataset(started(coordinator, chunks(4, rows=ROWS, after=error)))

    @tf.function
    def total(batches):
        rows = tf.constant(0)
        for batch in batches:
            rows += tf.shape(batch.data)[0]
        return rows

    with pytest.raises(iw.FetchFailed) as caught, iw.adapters.tf_data.own_errors(batches):
        total(batches.prefetch(2))
    assert caught.value.__cause__ is error
    with pytest.raises(iw.ConfigError, match="own_errors: got list"), iw.adapters.tf_data.own_errors([]):
        pass


def test_a_stop_ends_an_iteration_with_queue_closed(coordinator):
    gate = threading.Event()

    def fetch(worker_id, batch_size):
        if gate.is_set():
            return None
        gate.set()
        return make_chunk(worker_id, 0, ROWS)

    iterator = iter(iw.adapters.tf_data.dataset(started(coordinator, fetch)))
    next(iterator)
    stopper = threading.Timer(0.1, coordinator.stop)  # while the iterator waits, or before: the same end
    stopper.start()
    with pytest.raises(iw.QueueClosed):
        next(iterator)
    stopper.join()


def test_leaving_a_loop_early_loses_nothing_but_what_was_prefetched(coordinator):
    source = started(coordinator, chunks(400, rows=ROWS))
    witness = Witness()
    for number, batch in enumerate(iw.adapters.tf_data.dataset(source)):
        witness.see([batch.data.numpy(), batch.label.numpy()], ROWS)
        if number == 10:
            break
    seen = np.concatenate([check_batch(batch, ROWS)[:, 2] for batch in source])
    assert seen.tolist() == np.repeat(np.arange(seen[0], 400), ROWS).tolist()
    assert 11 <= seen[0] < 20  # TensorFlow had taken some ahead
    assert source.stats().rows_delivered == 400 * ROWS


def test_a_dropped_dataset_lets_go_of_its_source(coordinator):
    other = iw.GlobalCoordinator()
    source = started(other, chunks(10**9))
    batches = iw.adapters.tf_data.dataset(source)
    next(iter(batches.prefetch(2)))
    dropped = weakref.ref(source)
    del source, batches, other
    for _ in range(3):
        gc.collect()
    assert dropped() is None


REPLICAS = """
import sys
import numpy as np
import tensorflow as tf
import input_workers as iw
from self_certifying import Witness, make_chunk

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
calls = iter(range(31))

def fetch(worker_id, batch_size):
    call = next(calls)
    if call == 30:
        raise LookupError("disk on fire") if sys.argv[1] == "fail" else iw.EndOfData
    return make_chunk(worker_id, call, 12)

coordinator = iw.init_data_input_workers("numpy", ["data", "label"], fetch, 12, 1)
coordinator.start()
strategy = tf.distribute.MirroredStrategy(["/CPU:0", "/CPU:1"])
batches = iw.adapters.tf_data.dataset(coordinator["train"])
shared = strategy.experimental_distribute_dataset(batches)
witness = Witness()
try:
    with iw.adapters.tf_data.own_errors(batches):
        for batch in shared:
            parts = [strategy.experimental_local_results(each) for each in batch]
            assert [len(part) for part in parts[0]] == [6, 6]
            assert [part.device[-5:] for part in parts[0]] == ["CPU:0", "CPU:1"]
            witness.see([np.concatenate([part.numpy() for part in each]) for each in parts], 12)
    print(witness.rows)
except iw.FetchFailed as error:
    print(repr(error.__cause__))
coordinator.stop()
"""


@pytest.mark.parametrize(("end", "says"), [("end", "360"), ("fail", "LookupError('disk on fire')")])
def test_two_replicas_get_half_a_batch_each_and_the_users_error(end, says):
    tests = str(pathlib.Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", REPLICAS, end], capture_output=True, text=True, timeout=120, cwd=tests)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == says, done.stderr


def test_several_devices_are_asked_for_one_by_one(coordinator):
    iw.init_data_input_workers(
        "numpy", ["data", "label"], fetch := chunks(40), ROWS, 1, name_scope="a", coordinator=coordinator
    )
    iw.init_data_input_workers("numpy", ["data", "label"], fetch, ROWS, 1, name_scope="b", coordinator=coordinator)
    coordinator.start()
    with pytest.raises(iw.ConfigError, match="several devices"):
        iw.adapters.tf_data.dataset(coordinator["train"])
    assert next(iter(iw.adapters.tf_data.dataset(coordinator["a/train"]))).data.shape == (ROWS, 7)


def test_before_the_start_specs_must_be_given(coordinator):
    iw.init_data_input_workers("numpy", ["data", "label"], chunks(3), ROWS, 1, coordinator=coordinator)
    with pytest.raises(iw.LifecycleError, match="call start"):
        iw.adapters.tf_data.dataset(coordinator["train"])


def test_a_dtype_that_tensorflow_lacks_is_refused(coordinator):
    source = started(coordinator, lambda *_: [np.zeros(ROWS, "M8[s]")], names=["when"])
    with pytest.raises(iw.SpecMismatch, match="datetime64"):
        iw.adapters.tf_data.dataset(source)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_dataset_as_a_source(coordinator, workers):
    numbers = tf.data.Dataset.range(100).map(lambda n: {"b": (n, tf.cast(n, tf.float32)), "a": -n})
    fetch = iw.adapters.tf_data.fetch(numbers.batch(7))
    source = started(coordinator, fetch, names=["a", "n", "f"], workers=workers, last_batch="keep")
    rows = [np.stack(batch).T for batch in source]
    seen = np.concatenate(rows)
    assert sorted(seen[:, 1].tolist()) == list(range(100))
    assert (seen[:, 0] == -seen[:, 1]).all()
    assert (seen[:, 2] == seen[:, 1]).all()
    if workers < 2:
        assert seen[:, 1].tolist() == list(range(100))
    coordinator.stop()
    coordinator.start()
    assert sum(len(batch.n) for batch in source) == 100


def test_rows_as_a_source(coordinator):
    fetch = iw.adapters.tf_data.fetch(tf.data.Dataset.range(100), batched=False)
    source = started(coordinator, fetch, names=["number"])
    assert np.concatenate([batch.number for batch in source]).tolist() == list(range(96))


def test_an_error_inside_a_dataset_is_the_cause(coordinator):
    numbers = tf.data.Dataset.range(9).map(lambda n: tf.debugging.check_numerics(5.0 / tf.cast(n - 5, tf.float32), "")).batch(1)
    source = started(coordinator, iw.adapters.tf_data.fetch(numbers), names=["number"], rebatch=False)
    with pytest.raises(iw.FetchFailed) as caught:
        list(source)
    assert isinstance(caught.value.__cause__, tf.errors.InvalidArgumentError)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda: [1, 2], "got list; wanted a tf.data.Dataset"),
        (lambda: tf.data.Dataset.from_tensors(tf.ragged.constant([[1], [2, 3]])), "to_tensor"),
        (lambda: tf.data.Dataset.from_tensors(["text"]), "decode strings"),
    ],
)
def test_what_is_no_dense_dataset_is_refused(wrong, match):
    with pytest.raises(iw.ConfigError, match=match):
        iw.adapters.tf_data.fetch(wrong())
