"""The conformance suite of the feeds, for JAX's arrays. Imports JAX, with four devices on the host and 64-bit dtypes."""

import gc
import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with other tests

import jax
import numpy as np
from feeds.feed_conformance import NUMBERS, FeedConformance

from input_workers.feeds.jax_feed import JaxFeed, find_device

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
jax.devices()  # what it opens and starts stays until the process ends


class JaxConformance(FeedConformance):
    dtypes = NUMBERS

    def make_feed(self):
        device = self.feed.partition(":")[2]
        return JaxFeed(find_device(device) if device else None)

    def value(self, delivered):
        return np.asarray(delivered)

    def dtype(self, delivered):
        return delivered.dtype

    def let_go(self):
        gc.collect()  # JAX comes along, too

    def address(self, delivered):
        return delivered.addressable_shards[0].data.unsafe_buffer_pointer()
