"""A source as a tf.data.Dataset, and a tf.data.Dataset as a source."""

import numpy as np
import tensorflow as tf

import input_workers as iw
from input_workers.adapters import tf_data

pictures = iw.sources.Arrays(np.random.rand(1000, 8, 8).astype("float32"), np.random.randint(0, 10, 1000))
coordinator = iw.init_data_input_workers("numpy", ["picture", "label"], iw.Stream(pictures, shuffle=True), 32, num_workers=4)
with coordinator:
    batches = tf_data.dataset(coordinator["train"])
    brighter = batches.map(lambda batch: (batch.picture * 2.0, batch.label)).prefetch(2)
    count = sum(1 for _ in brighter)

squares = tf.data.Dataset.range(1000).map(lambda n: n * n)
other = iw.GlobalCoordinator()
iw.init_data_input_workers("numpy", ["square"], tf_data.fetch(squares, batched=False), 100, num_workers=1, coordinator=other)
with other:
    last = [batch.square[-1] for batch in other["train"]][-1]
print(f"{count} batches of {batches.element_spec.picture.shape}; the last square is {last}")
