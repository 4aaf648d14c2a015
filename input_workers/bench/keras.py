"""Keras' fit over a data set that Python computes: our two processes beside its own two threads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

import input_workers as iw
from input_workers.bench.measure import Result, Stopwatch, compare, median_ratio, report

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DistortedCharacters", "main"]

WORKERS = 2
SIDE, BATCH, BATCHES = 24, 16, 300
CLASSES = 10


class DistortedCharacters(keras.utils.PyDataset):  # type: ignore[misc]  # Keras is not typed
    """Characters that are turned, sheared, and rolled row by row along a sine, pixel by pixel: nothing gives up the GIL.

    A batch is ((BATCH, SIDE, SIDE, 1) float32, (BATCH,) int64).
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        rng = np.random.default_rng(0)
        blobs = rng.random((CLASSES, SIDE // 4, SIDE // 4)) > 0.5  # as good as letters: ten figures of coarse strokes
        self.characters = np.kron(blobs, np.ones((4, 4))).astype(np.float32)

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        rng = np.random.default_rng(index)
        labels = rng.integers(0, CLASSES, BATCH)
        return np.stack([self._distorted(self.characters[label], rng) for label in labels])[..., None], labels

    @staticmethod
    def _distorted(character: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
        angle, shear, wave = rng.uniform(-0.4, 0.4), rng.uniform(-0.3, 0.3), rng.uniform(0.0, 2.0)
        sine, cosine = math.sin(angle), math.cos(angle)
        middle = SIDE / 2
        pixels = character.tolist()
        out = []
        for row in range(SIDE):
            roll = wave * math.sin(row / 3.0)
            line = []
            for column in range(SIDE):
                x, y = column - middle + roll + shear * row, row - middle
                at, to = int(cosine * y - sine * x + middle), int(sine * y + cosine * x + middle)
                line.append(pixels[at][to] if 0 <= at < SIDE and 0 <= to < SIDE else 0.0)
            out.append(line)
        return np.array(out, np.float32)


def model() -> Any:
    """Return a model whose training costs next to nothing."""
    keras.utils.set_random_seed(0)
    layers = [keras.Input((SIDE, SIDE, 1)), keras.layers.Flatten(), keras.layers.Dense(CLASSES)]
    built = keras.Sequential(layers)
    built.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), optimizer="sgd")
    return built


def rate(trained: Any, data: Any) -> float:
    """Return the rows/s of an epoch of training."""
    watch = Stopwatch()
    with watch.running():
        trained.fit(data, verbose=0)
    return BATCHES * BATCH / watch.seconds


def against_keras() -> list[Result]:
    """An epoch of fit, the start of its workers in it, on a model that costs nothing."""
    trained = model()
    ours = iw.adapters.keras.parallel(DistortedCharacters(), WORKERS)
    threads = DistortedCharacters(workers=WORKERS)
    for data in (ours, threads):
        trained.fit(data, verbose=0)  # what is done once: Keras traces, the fork server imports Keras
    rates = compare({"ours": lambda: rate(trained, ours), "threads": lambda: rate(trained, threads)})
    both = f"{WORKERS} workers, batches of {BATCH} characters of {SIDE}x{SIDE}, {BATCHES} an epoch"
    return [
        Result("Keras' fit, Python's own work, of Keras' threads", median_ratio(rates, "ours", "threads"), 1.8, "", both),
        Result("rows/s of ours", float(np.median(rates["ours"])), None, "rows/s", ""),
    ]


def main(only: str = "") -> int:
    """Measure, print; 0 if every target is met."""
    return report({"fit": against_keras}, only)
