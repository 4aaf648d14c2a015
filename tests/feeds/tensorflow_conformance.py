"""The conformance suite of the feeds, for TensorFlow's tensors. Imports TensorFlow."""

import numpy as np
import tensorflow as tf
from feeds.feed_conformance import FeedConformance

from input_workers.feeds.tensorflow_feed import TensorFlowFeed


class TensorFlowConformance(FeedConformance):
    def make_feed(self):
        return TensorFlowFeed(self.feed.partition(":")[2] or None)

    def value(self, delivered):
        return delivered.numpy()

    def dtype(self, delivered):
        return np.dtype("S" if delivered.dtype == tf.string else delivered.dtype.as_numpy_dtype)

    def address(self, delivered):
        return np.asarray(memoryview(delivered)).ctypes.data
