"""Scenarios for `epochs()`, run in a process of their own: Keras has one backend in each. Prints a line for each that holds."""

import sys

import keras
import numpy as np
import pytest
from keras_checks import make_checks

import input_workers as iw

ROWS, STEPS = 8, 5


class OwnError(Exception):
    """Of a user's."""


class Seen(keras.layers.Layer):
    """Keeps the sum of the row numbers that pass in training; each step is counted once."""

    def build(self, shape):
        self.total = self.add_weight(shape=(), initializer="zeros", trainable=False, name="total")
        self.steps = self.add_weight(shape=(), initializer="zeros", trainable=False, name="steps")

    def call(self, x, training=False):
        if training:
            self.total.assign_add(keras.ops.sum(x[:, 0]))
            self.steps.assign_add(1.0)
        return x


def model_of(seen, **compiled):
    model = keras.Sequential([seen, keras.layers.Dense(1)])
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss="mse", metrics=["mae"], **compiled)
    return model


def source_of(feed="numpy", rows=1000, fail_at=None, rebatch=True, **more):
    """Rows that are their own numbers: (row, row) and the label -row."""
    coordinator = iw.GlobalCoordinator()

    class Numbers:
        def __len__(self):
            return rows

        def fetch(self, wanted, request):
            if fail_at is not None and (wanted >= fail_at).any():
                raise OwnError("disk on fire")
            return [np.repeat(wanted.astype(np.float32)[:, None], 2, 1), -wanted.astype(np.float32)[:, None]]

    stream = iw.Stream(Numbers(), **{"epochs": None, "shuffle": False, **more})
    iw.init_data_input_workers(feed, ["x", "y"], stream, ROWS, 2, ordered=True, rebatch=rebatch, coordinator=coordinator)
    coordinator.start()
    return coordinator, coordinator["train"]


def trained(seen):
    return int(seen.steps.numpy() if hasattr(seen.steps, "numpy") else seen.steps), float(
        np.asarray(keras.ops.convert_to_numpy(seen.total))
    )


def expected(first_row, rows):
    return float(sum(range(first_row, first_row + rows)))


def every_row_is_trained_once_in_order(feed="numpy"):
    coordinator, source = source_of(feed)
    with coordinator:
        seen = Seen()
        model = model_of(seen)
        batches = source.epochs(steps_per_epoch=STEPS)
        history = model.fit(batches, epochs=3, verbose=0)
        assert len(history.history["loss"]) == 3
        assert trained(seen) == (15, expected(0, 15 * ROWS)), trained(seen)
        model.fit(batches, epochs=1, verbose=0)
        assert trained(seen) == (20, expected(0, 20 * ROWS)), trained(seen)
        assert len(batches) == STEPS


def an_epoch_is_as_long_as_the_streams():
    for end in ("run_on", "break"):
        coordinator, source = source_of(rows=5 * ROWS + 3, epoch_end=end, epochs=None)
        with coordinator:
            seen = Seen()
            batches = source.epochs()
            assert len(batches) == 5
            model_of(seen).fit(batches, epochs=2, verbose=0)
            # run_on: the three rows left over come first in the second epoch
            total = 2 * expected(0, 5 * ROWS) if end == "break" else expected(0, 43) + expected(0, 80 - 43)
            assert trained(seen) == (10, total), (end, trained(seen), total)


def it_validates_evaluates_and_predicts():
    coordinator, source = source_of()
    other, test = source_of()
    with coordinator, other:
        seen = Seen()
        model = model_of(seen)
        history = model.fit(source.epochs(STEPS), epochs=2, validation_data=test.epochs(3), verbose=0)
        assert len(history.history["val_loss"]) == 2
        assert trained(seen) == (10, expected(0, 10 * ROWS))
        loss = model.evaluate(test.epochs(4), verbose=0)
        assert np.isfinite(loss).all()
        out = model.predict(test.epochs(4, arrange=lambda batch: (batch.x,)), verbose=0)
        assert out.shape == (4 * ROWS, 1)
        # two epochs of validation and one of evaluation came before
        weights = [np.asarray(keras.ops.convert_to_numpy(each)) for each in model.layers[-1].trainable_weights]
        first = (2 * 3 + 4) * ROWS
        rows = np.repeat(np.arange(first, first + 4 * ROWS, dtype=np.float32)[:, None], 2, 1)
        np.testing.assert_allclose(out, rows @ weights[0] + weights[1], rtol=1e-4)


def inputs_by_name():
    coordinator, source = source_of()
    with coordinator:
        left, right = keras.Input((2,), name="left"), keras.Input((2,), name="right")
        model = keras.Model({"left": left, "right": right}, keras.layers.Dense(1)(left + right))
        model.compile(loss="mse")
        model.fit(source.epochs(STEPS, lambda batch: ({"left": batch.x, "right": batch.x}, batch.y)), verbose=0)


def the_users_error_comes_out_of(call):
    coordinator, source = source_of(fail_at=3 * ROWS)
    with coordinator:
        model = model_of(Seen())
        arrange = (lambda batch: (batch.x,)) if call == "predict" else tuple
        with pytest.raises(iw.FetchFailed, match="request 3") as caught:
            getattr(model, call)(source.epochs(20, arrange), verbose=0)
        assert isinstance(caught.value.cause, OwnError), caught.value.cause
        assert any("keras_child.py" in note for note in caught.value.__notes__)


def a_source_that_ends_early_is_said_to():
    coordinator, source = source_of(rows=3 * ROWS, epochs=1)
    with coordinator:
        seen = Seen()
        with pytest.warns(UserWarning, match="ran out of data"):
            model_of(seen).fit(source.epochs(5), epochs=1, verbose=0)
        assert trained(seen)[1] == expected(0, 3 * ROWS)  # of a step without data, TensorFlow runs what needs none


def it_says_what_it_needs():
    coordinator = iw.init_data_input_workers("numpy", ["x"], lambda *_: [np.zeros(8)], 8, coordinator=iw.GlobalCoordinator())
    with pytest.raises(iw.ConfigError, match="wanted steps_per_epoch"):
        coordinator["train"].epochs()
    coordinator, source = source_of(rebatch=False, rows_per_request=3)
    with coordinator, pytest.raises(iw.ConfigError, match="not with rebatch=False"):
        source.epochs()
    stream = iw.Stream(iw.sources.Arrays(np.arange(20)), epochs=None)
    mix = iw.sources.Mix({"first": (stream, 1), "second": (stream, 1)})
    coordinator = iw.init_data_input_workers("numpy", ["x"], mix, 4, coordinator=iw.GlobalCoordinator())
    with pytest.raises(iw.ConfigError, match="a Mix that ends"):
        coordinator["train"].epochs()


def fits_own_steps_use_every_batch_once():
    for own_steps in (1, 2, 3):
        coordinator, source = source_of()
        with coordinator:
            seen = Seen()
            batches = source.epochs(steps_per_epoch=6)
            model_of(seen).fit(batches, epochs=12, steps_per_epoch=own_steps, verbose=0)
            steps = 12 * own_steps
            assert trained(seen) == (steps, expected(0, steps * ROWS)), (own_steps, trained(seen))


def main(feeds):
    checks = [(f"once in order, {feed}", lambda feed=feed: every_row_is_trained_once_in_order(feed)) for feed in feeds]
    checks += [
        (f"error in {call}", lambda call=call: the_users_error_comes_out_of(call)) for call in ("fit", "evaluate", "predict")
    ]
    checks += [(check.__name__, check) for check in (
        an_epoch_is_as_long_as_the_streams, it_validates_evaluates_and_predicts, inputs_by_name,
        a_source_that_ends_early_is_said_to, it_says_what_it_needs, fits_own_steps_use_every_batch_once,
    )]  # fmt: skip
    make_checks(checks)


if __name__ == "__main__":
    main(sys.argv[1:])
