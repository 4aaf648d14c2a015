"""A configuration's model goes in, a Keras model with its training and evaluation steps comes out.

Imports TensorFlow and Keras.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from input_workers.config import SMALL_CNN, Model
from input_workers.errors import ConfigError, StateMismatch

__all__ = ["Trainer"]

# The files of a checkpoint that are the trainer's.
MODEL, TRAINING = "model.keras", "training.npz"


class Trainer:
    """A model, its optimizer, and what they have reached in this epoch. Belongs to one thread.

    Args:
        model: which, and how it learns.
        classes: how many a picture may belong to.
        steps: of the whole training.
        seed: of the first weights and of dropout.

    Raises:
        ConfigError: Keras refuses the model, for example because the pictures are too small for it.
    """

    def __init__(self, model: Model, classes: int, steps: int, seed: int) -> None:
        if keras.backend.backend() != "tensorflow":
            raise ConfigError(f"KERAS_BACKEND: got {keras.backend.backend()!r}; wanted 'tensorflow'")
        keras.utils.set_random_seed(seed)
        shape = (*model.image_size, 3)
        try:
            self._model, self._prepare = (
                _small_cnn(shape, classes) if model.name == SMALL_CNN else _application(model.name, shape, classes)
            )
        except ValueError as error:
            raise ConfigError(f"model: {model.name} for pictures of {model.image_size}: {error}") from error
        schedule = keras.optimizers.schedules.CosineDecay(model.learning_rate, steps)
        self._optimizer = keras.optimizers.Adam(schedule)
        self._optimizer.build(self._model.trainable_variables)
        self._loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self._loss = keras.metrics.Mean()
        self._accuracy = keras.metrics.SparseCategoricalAccuracy()
        # The number of rows is left open: the last batch of an epoch may be shorter, and would be traced again.
        signature = [tf.TensorSpec((None, *shape), tf.uint8), tf.TensorSpec((None,), tf.int64)]
        self.train = tf.function(self._train, input_signature=signature)
        self.evaluate = tf.function(self._evaluate, input_signature=signature)

    def _train(self, image: Any, label: Any) -> None:
        with tf.GradientTape() as tape:
            logits = self._model(self._prepare(tf.cast(image, tf.float32)), training=True)
            loss = self._loss_of(label, logits)
        variables = self._model.trainable_variables
        self._optimizer.apply(tape.gradient(loss, variables), variables)
        self._loss.update_state(loss, sample_weight=tf.shape(label)[0])
        self._accuracy.update_state(label, logits)

    def _evaluate(self, image: Any, label: Any) -> None:
        logits = self._model(self._prepare(tf.cast(image, tf.float32)), training=False)
        self._loss.update_state(self._loss_of(label, logits), sample_weight=tf.shape(label)[0])
        self._accuracy.update_state(label, logits)

    def reached(self) -> tuple[float, float]:
        """Return loss and accuracy of the steps since `forget`; waits for them."""
        return float(self._loss.result()), float(self._accuracy.result())

    def forget(self) -> None:
        """Begin loss and accuracy anew."""
        self._loss.reset_state()
        self._accuracy.reset_state()

    def save(self, folder: Path) -> None:
        """Write all that it is to two files: the model, and what is beside it. Raises OSError."""
        self._model.save(folder / MODEL)
        np.savez(folder / TRAINING, **{name: variable.numpy() for name, variable in self._beside_the_model().items()})

    def load(self, folder: Path) -> None:
        """Become what was saved. Raises StateMismatch, naming the file, if that was another model or optimizer."""
        path = folder / MODEL
        try:
            self._model.load_weights(path)
            path = folder / TRAINING
            wanted = self._beside_the_model()
            with np.load(path, allow_pickle=False) as saved:
                if set(saved) != set(wanted):
                    raise ValueError(f"it holds {len(saved)} arrays; wanted {len(wanted)}, {', '.join(wanted)}")
                for name, variable in wanted.items():
                    variable.assign(saved[name])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise StateMismatch(f"{path}: does not fit the model of the configuration: {error}") from error

    def _beside_the_model(self) -> dict[str, Any]:
        """Return what a step changes beside the weights, by name: optimizer, seeds of dropout, loss and accuracy so far."""
        weights = {id(variable) for variable in self._model.weights}
        groups = {
            "seed": [variable for variable in self._model.variables if id(variable) not in weights],
            "optimizer": self._optimizer.variables,
            "loss": self._loss.variables,
            "accuracy": self._accuracy.variables,
        }
        return {f"{group}-{number}": each for group, variables in groups.items() for number, each in enumerate(variables)}


def _small_cnn(shape: tuple[int, ...], classes: int) -> tuple[Any, Any]:
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input(shape),
            layers.Rescaling(1 / 255),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(padding="same"),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(padding="same"),
            layers.Flatten(),
            layers.Dropout(0.3),
            layers.Dense(64, activation="relu"),
            layers.Dense(classes),
        ]
    )
    return model, lambda image: image


def _application(name: str, shape: tuple[int, ...], classes: int) -> tuple[Any, Any]:
    make = getattr(keras.applications, name, None)
    if make is None:
        raise ConfigError(f"model.name: Keras {keras.__version__} has no {name}; wanted a newer Keras or another model")
    model = make(weights=None, input_shape=shape, classes=classes, classifier_activation=None)
    return model, sys.modules[make.__module__].preprocess_input
