"""Scenarios for `adapters.keras.parallel`, run in a process of their own. Prints a line for each that holds."""

import gc
import os
import sys

import keras
import numpy as np
import psutil
import pytest
from keras_checks import make_checks

import input_workers as iw
from input_workers.fetchers.fork_server import fork_server

BATCH, ROWS = 4, 30  # the last batch has two rows
MANY = 400  # more than the queues take


class OwnError(Exception):
    """Of a user's."""


class Numbers(keras.utils.PyDataset):
    """Rows that are their own numbers, in the order of `rows`, which the end of an epoch turns round."""

    def __init__(self, fail_at=None, rows=ROWS):
        super().__init__()
        self.rows = np.arange(rows, dtype=np.float32)
        self.fail_at = fail_at
        self.epochs_begun, self.epochs_ended = [], []

    def __len__(self):
        return -(-len(self.rows) // BATCH)

    def __getitem__(self, index):
        if self.fail_at == index:
            raise OwnError("disk on fire")
        rows = self.rows[index * BATCH : (index + 1) * BATCH]
        return {"a": np.repeat(rows[:, None], 2, 1), "b": np.full((len(rows), 1), os.getpid(), np.float32)}, -rows[:, None]

    def on_epoch_begin(self):
        self.epochs_begun.append(os.getpid())

    def on_epoch_end(self):
        self.epochs_ended.append(os.getpid())
        self.rows = self.rows[::-1].copy()


def model_of():
    a, b = keras.Input((2,), name="a"), keras.Input((1,), name="b")
    model = keras.Model({"a": a, "b": b}, keras.layers.Dense(1)(a) + 0.0 * b)
    model.compile(loss="mse", optimizer=keras.optimizers.SGD(0.0))
    return model


def numbers_of(dataset):
    """Return the row numbers of an epoch, and which processes made it, as a Keras backend would get them."""
    dataset.on_epoch_begin()
    batches = list(dataset.get_numpy_iterator())
    dataset.on_epoch_end()
    for x, y in batches:
        assert (x["a"][:, 0] == -y[:, 0]).all()
    return [int(n) for x, _ in batches for n in x["a"][:, 0]], {int(x["b"][0, 0]) for x, _ in batches}


def children():
    server = fork_server.holds()
    return [each for each in psutil.Process().children(recursive=True) if server is None or each.pid != server[0]]


def no_worker_is_left():
    gc.collect()
    _, left = psutil.wait_procs(children(), timeout=20)
    assert not left, left


def fit_evaluate_and_predict_take_it(fetchers):
    own = Numbers()
    dataset = iw.adapters.keras.parallel(own, 2, fetchers)
    model = model_of()
    assert len(dataset) == 8
    history = model.fit(dataset, epochs=3, verbose=0, validation_data=iw.adapters.keras.parallel(Numbers(), 2, fetchers))
    assert len(history.history["val_loss"]) == 3
    assert own.epochs_ended == [os.getpid()] * 3
    assert len(own.epochs_begun) >= 3
    no_worker_is_left()
    assert np.isfinite(model.evaluate(dataset, verbose=0))
    out = model.predict(dataset, verbose=0)
    weights = [np.asarray(keras.ops.convert_to_numpy(each)) for each in model.trainable_weights]
    np.testing.assert_allclose(
        out, np.repeat(np.arange(ROWS, dtype=np.float32)[:, None], 2, 1) @ weights[0] + weights[1], rtol=1e-5
    )
    no_worker_is_left()


def an_epoch_has_every_batch_once_as_on_epoch_end_left_them():
    dataset = iw.adapters.keras.parallel(Numbers(), 2, iw.Processes(preload=("keras",)))
    first, workers = numbers_of(dataset)
    assert first == list(range(ROWS))
    assert os.getpid() not in workers
    second, others = numbers_of(dataset)
    assert second == list(range(ROWS))[::-1]
    assert not workers & others


def in_another_order_and_in_any_order():
    shuffled = iw.adapters.keras.parallel(Numbers(), 3, "thread", shuffle=True, seed=7)
    orders = [numbers_of(shuffled)[0] for _ in range(4)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(ROWS)) for order in orders)
    again = iw.adapters.keras.parallel(Numbers(), 1, "thread", shuffle=True, seed=7)
    assert numbers_of(again)[0] == orders[0]
    unordered = iw.adapters.keras.parallel(Numbers(), 3, "thread", ordered=False)
    assert sorted(numbers_of(unordered)[0]) == list(range(ROWS))


def the_users_error_comes_out(fetchers):
    with pytest.raises(iw.FetchFailed, match="disk on fire") as caught:
        model_of().fit(iw.adapters.keras.parallel(Numbers(fail_at=3), 2, fetchers), verbose=0)
    assert isinstance(caught.value.cause, OwnError)
    assert any("in __getitem__" in note for note in caught.value.__notes__)
    del caught
    no_worker_is_left()


def an_error_in_training_leaves_no_worker(batch):
    class Fails(keras.callbacks.Callback):
        def on_train_batch_end(self, number, logs=None):
            if number == batch:
                assert children()
                raise OwnError("of a callback")

    dataset = iw.adapters.keras.parallel(Numbers(rows=MANY), 2, max_buffered_batches=1)
    with pytest.raises(OwnError):
        model_of().fit(dataset, verbose=0, callbacks=[Fails()])
    no_worker_is_left()
    model_of().fit(dataset, verbose=0)
    with pytest.raises(OwnError), iw.adapters.keras.parallel(Numbers(rows=MANY), 2, max_buffered_batches=1) as dataset:
        model_of().fit(dataset, verbose=0, callbacks=[Fails()])
    assert not children()


def ctrl_c():
    """Print who works, and train until it is interrupted."""

    class Says(keras.callbacks.Callback):
        def on_train_batch_end(self, number, logs=None):
            if number == 0:
                print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)  # noqa: T201

    model_of().fit(
        iw.adapters.keras.parallel(Numbers(rows=MANY), 2, max_buffered_batches=1), epochs=10**6, verbose=0, callbacks=[Says()]
    )


def an_epoch_that_fit_reads_in_small_steps_is_one():
    own = Numbers()
    dataset = iw.adapters.keras.parallel(own, 2, "thread")
    model_of().fit(dataset, epochs=8, steps_per_epoch=2, verbose=0)  # two times the dataset's eight batches
    assert len(own.epochs_ended) in (2, 3), own.epochs_ended  # TensorFlow takes some batches ahead
    dataset.close()


def main(fetchers):
    checks = [(fetcher, lambda fetcher=fetcher: fit_evaluate_and_predict_take_it(fetcher)) for fetcher in fetchers]
    checks += [(f"error, {fetcher}", lambda fetcher=fetcher: the_users_error_comes_out(fetcher)) for fetcher in fetchers]
    checks.append(("small steps", an_epoch_that_fit_reads_in_small_steps_is_one))
    if "process" in fetchers:
        checks += [
            (f"error in training, {batch}", lambda batch=batch: an_error_in_training_leaves_no_worker(batch))
            for batch in (0, 4)
        ]
        checks += [(check.__name__, check) for check in (
            an_epoch_has_every_batch_once_as_on_epoch_end_left_them, in_another_order_and_in_any_order,
        )]  # fmt: skip
    make_checks(checks)


if __name__ == "__main__":
    if sys.argv[1:] == ["ctrl_c"]:
        ctrl_c()
    else:
        main(sys.argv[1:])
