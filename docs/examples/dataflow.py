"""A DataFlow, as tensorpack has them, mapped by four threads, in exact batches; then the source as a DataFlow itself."""

from collections.abc import Iterator

import numpy as np

import input_workers as iw
from input_workers.adapters import dataflow


class Images:  # or any DataFlow of tensorpack
    def reset_state(self) -> None:
        self.rng = np.random.default_rng()

    def __iter__(self) -> Iterator[list]:
        for number in range(1000):
            yield [self.rng.integers(0, 256, (32, 32, 3), dtype=np.uint8), number]


def scaled(point: list) -> list:
    return [point[0].astype("float32") / 255, point[1]]


df = dataflow.map(Images(), scaled, workers=4)  # each data point once, in order; in processes: fetchers="process"
coordinator = iw.init_data_input_workers("numpy", ["image", "label"], dataflow.fetch(df), 64, 1, last_batch="keep")
with coordinator:
    batches = dataflow.SourceDataFlow(coordinator["train"])
    labels = np.concatenate([label for _image, label in iter(batches)])
print(f"{len(labels)} rows in batches of 64, each once, in order: {labels.tolist() == [*range(1000)]}")
