"""Which feeds may be named, and what is said about those that may not."""

import sys

import numpy as np
import pytest

import input_workers as iw
from input_workers.feeds import FEEDS, NumpyFeed, feed_maker


def test_a_feed_of_ones_own_may_be_passed():
    feed = NumpyFeed()
    assert feed_maker(feed, 4)() is feed
    assert isinstance(feed_maker("numpy", 4)(), NumpyFeed)


@pytest.mark.parametrize("feed", ["numpi", "", "numpy:", "numpy:0", "Torch", "pytorch:cpu", ":cpu", 3, None, NumpyFeed])
def test_an_unknown_feed_is_an_error_that_lists_the_choices(feed):
    choices = "'numpy'" if not isinstance(feed, str) else ", ".join(repr(name) for names in FEEDS.values() for name in names)
    with pytest.raises(iw.ConfigError, match=r"a jax.sharding.Sharding or a DeviceFeed") as caught:
        feed_maker(feed, 4)
    assert choices in str(caught.value)


@pytest.mark.parametrize("name", [name for names in FEEDS.values() for name in names if name != "numpy"])
def test_without_its_framework_the_error_names_what_to_install(monkeypatch, name):
    framework = name.partition(":")[0]
    monkeypatch.setitem(sys.modules, framework, None)  # as if it were not there
    coordinator = iw.GlobalCoordinator()
    with pytest.raises(iw.ConfigError, match=rf"'{name}': .* not installed; pip install input-workers\[{framework}\]"):
        iw.init_data_input_workers(name, ["data"], lambda *_: [np.zeros(4)], 4, coordinator=coordinator)
    assert len(coordinator) == 0


@pytest.mark.parametrize("framework", ["tensorflow", "torch", "jax"])
def test_a_colon_without_a_device_is_an_error(framework):
    pytest.importorskip(framework)
    with pytest.raises(iw.ConfigError, match=rf"'{framework}:': got no device; wanted '{framework}:.*' or '{framework}:"):
        feed_maker(f"{framework}:", 4)
