"""The NumPy feed, the plain reference."""

from feeds.feed_conformance import FeedConformance, MayBeWrittenTo

from input_workers.feeds import NumpyFeed


class TestNumpyFeed(FeedConformance, MayBeWrittenTo):
    feed = "numpy"

    def make_feed(self):
        return NumpyFeed()

    def value(self, delivered):
        return delivered

    def dtype(self, delivered):
        return delivered.dtype

    def address(self, delivered):
        return delivered.ctypes.data
