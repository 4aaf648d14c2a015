"""Feeds move a slot to a device: NumPy (the host, the plain reference), TensorFlow, PyTorch, JAX."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from input_workers.contracts import DeviceFeed
from input_workers.errors import ConfigError
from input_workers.feeds.numpy_feed import NumpyFeed

if TYPE_CHECKING:
    from jax.sharding import Sharding

__all__ = ["FEEDS", "Feed", "NumpyFeed", "feed_maker"]

# What the user passes as feed.
Feed: TypeAlias = "str | DeviceFeed | Sharding"

# Names as they may be written, of each framework: without a device where it puts things by itself.
FEEDS = {
    "numpy": ("numpy",),
    "tensorflow": ("tensorflow", "tensorflow:/GPU:0", "tensorflow:/CPU:0"),
    "torch": ("torch", "torch:cpu", "torch:cuda:0"),
    "jax": ("jax", "jax:cpu:0", "jax:gpu:0"),
}
TITLES = {"tensorflow": "TensorFlow", "torch": "PyTorch", "jax": "JAX"}


def feed_maker(feed: Feed, batch_size: int, batch_axes: Sequence[int] = (0,)) -> Callable[[], DeviceFeed]:
    """Return what makes the feed when a source is started: a framework is imported then, not before.

    Args:
        feed: a name of FEEDS, with the device that is wanted; a `jax.sharding.Sharding`; or a DeviceFeed.
        batch_size: rows of a batch.
        batch_axes: the batch axis of each input.

    Raises:
        ConfigError: it is unknown, its framework is not installed, or a sharding cannot deal out batches of that size.
    """
    if not isinstance(feed, str):
        jax = sys.modules.get("jax")
        if jax is not None and isinstance(feed, jax.sharding.Sharding):
            return _sharding_maker(feed, batch_size, batch_axes)
        if isinstance(feed, DeviceFeed) and not isinstance(feed, type):
            return lambda: feed
        got = type(feed).__qualname__
        raise ConfigError(f"feed: got {got}; wanted a name, such as 'numpy', a jax.sharding.Sharding or a DeviceFeed")
    framework, colon, device = feed.partition(":")
    if framework not in FEEDS or (framework == "numpy" and colon):
        names = ", ".join(repr(name) for names in FEEDS.values() for name in names)
        raise ConfigError(f"feed {feed!r} is unknown; wanted one of {names}, a jax.sharding.Sharding or a DeviceFeed")
    if framework == "numpy":
        return NumpyFeed
    if importlib.util.find_spec(framework) is None:
        raise ConfigError(f"feed {feed!r}: {TITLES[framework]} is not installed; pip install input-workers[{framework}]")
    if colon and not device:
        wanted = " or ".join(repr(name) for name in FEEDS[framework][1:])
        raise ConfigError(f"feed {feed!r}: got no device; wanted {wanted}")
    makers = {"tensorflow": _make_tensorflow_feed, "torch": _make_torch_feed, "jax": _make_jax_feed}
    return lambda: makers[framework](device)


def _make_tensorflow_feed(device: str) -> DeviceFeed:
    from input_workers.feeds.tensorflow_feed import TensorFlowFeed

    return TensorFlowFeed(device or None)


def _make_torch_feed(device: str) -> DeviceFeed:
    from input_workers.feeds.torch_feed import make_torch_feed

    return make_torch_feed(device)


def _make_jax_feed(device: str) -> DeviceFeed:
    from input_workers.feeds.jax_feed import JaxFeed, find_device

    return JaxFeed(find_device(device) if device else None)


def _sharding_maker(sharding: Sharding, batch_size: int, batch_axes: Sequence[int]) -> Callable[[], DeviceFeed]:
    from input_workers.feeds.jax_feed import JaxFeed, check_sharding  # JAX is loaded already

    check_sharding(sharding, batch_size, batch_axes)
    return lambda: JaxFeed(sharding)
