"""What one feed delivers, another framework takes over by DLPack: equal values, and on the host the same memory."""

import itertools

import numpy as np
import pytest

import input_workers as iw

tf = pytest.importorskip("tensorflow")
torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
import feeds.jax_conformance  # noqa: E402, F401  JAX as the other tests have it

from input_workers.sources import Arrays  # noqa: E402

pytestmark = [pytest.mark.tensorflow, pytest.mark.torch, pytest.mark.jax]
DATA = np.arange(64, dtype=np.float32).reshape(16, 4)
FEEDS = ("numpy", "tensorflow:/CPU:0", "torch:cpu", "jax:cpu:0")
TAKERS = {
    "numpy": (np.from_dlpack, lambda array: array.ctypes.data),
    "torch": (torch.from_dlpack, lambda tensor: tensor.data_ptr()),
    "jax": (jax.dlpack.from_dlpack, lambda array: array.unsafe_buffer_pointer()),
    "tensorflow": (
        lambda array: tf.experimental.dlpack.from_dlpack(array.__dlpack__()),
        lambda tensor: np.asarray(memoryview(tensor)).ctypes.data,
    ),
}


def deliver(feed):
    coordinator = iw.GlobalCoordinator()
    iw.init_data_input_workers(feed, ["data"], iw.Stream(Arrays(DATA), rows_per_request=3), 8, 1, coordinator=coordinator)
    with coordinator:
        return [batch.data for batch in coordinator["train"]]


@pytest.mark.parametrize(("feed", "taker"), list(itertools.product(FEEDS, TAKERS)))
def test_arrays_are_taken_over_with_their_memory_and_hold_it(feed, taker):
    take, address_of = TAKERS[taker]
    _, address_before = TAKERS[feed.partition(":")[0]]
    first, second = deliver(feed)
    address = address_before(first)
    taken = take(first)
    del first
    more = deliver(feed)  # nothing of it may come where the first was
    assert address_of(taken) == address
    assert np.asarray(taken).tolist() == DATA[:8].tolist()
    assert np.asarray(take(second)).tolist() == DATA[8:].tolist()
    assert address not in [address_before(each) for each in more]
