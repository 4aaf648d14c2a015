"""Feeds move a slot to a device: NumPy (the host, the plain reference), TensorFlow."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from input_workers.contracts import DeviceFeed
from input_workers.errors import ConfigError
from input_workers.feeds.numpy_feed import NumpyFeed

__all__ = ["NumpyFeed", "feed_maker"]

NOT_BUILT = ("torch", "jax")


def feed_maker(feed: str | DeviceFeed) -> Callable[[], DeviceFeed]:
    """Return what makes the feed when a source is started: a framework is imported then, not before.

    Args:
        feed: "numpy", "tensorflow", "tensorflow:/GPU:0", "tensorflow:/CPU:0", or a DeviceFeed.

    Raises:
        ConfigError: it is unknown, or its framework is not installed.
    """
    if not isinstance(feed, str):
        if isinstance(feed, DeviceFeed):
            return lambda: feed
        raise ConfigError(f"feed: got {type(feed).__qualname__}; wanted a name, such as 'numpy', or a DeviceFeed")
    framework, _, device = feed.partition(":")
    if framework == "numpy" and not device:
        return _make_numpy_feed
    if framework == "tensorflow":
        if importlib.util.find_spec("tensorflow") is None:
            raise ConfigError(f"feed {feed!r}: TensorFlow is not installed; pip install input-workers[tensorflow]")
        if ":" in feed and not device:
            raise ConfigError(f"feed {feed!r}: got no device; wanted 'tensorflow:/GPU:0' or 'tensorflow:/CPU:0'")

        def make_tensorflow_feed() -> DeviceFeed:
            from input_workers.feeds.tensorflow_feed import TensorFlowFeed

            return TensorFlowFeed(device or None)

        return make_tensorflow_feed
    if framework in NOT_BUILT:
        raise ConfigError(f"feed {feed!r}: feeds for {framework} are not built yet; wanted 'numpy' or 'tensorflow'")
    raise ConfigError(f"feed {feed!r} is unknown; wanted 'numpy', 'tensorflow', 'tensorflow:/GPU:0' or a DeviceFeed")


def _make_numpy_feed() -> DeviceFeed:
    return NumpyFeed()
