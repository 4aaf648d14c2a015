"""The NumPy feed, the plain reference."""

import numpy as np
from feeds.feed_conformance import FeedConformance

from input_workers.feeds import NumpyFeed


class TestNumpyFeed(FeedConformance):
    feed = "numpy"

    def make_feed(self):
        return NumpyFeed()

    def value(self, delivered):
        return delivered

    def dtype(self, delivered):
        return delivered.dtype

    def address(self, delivered):
        return delivered.ctypes.data

    def test_the_trainer_may_write_to_its_batch(self):
        feed, pool = self.opened(np.float32)
        slot = pool.lease()
        slot.arrays[0][...] = 0
        (mine,) = feed.receive(feed.send(slot))
        mine += 1
        del slot
        other = pool.lease().arrays[0]
        other[...] = 7
        assert (mine == 1).all()
