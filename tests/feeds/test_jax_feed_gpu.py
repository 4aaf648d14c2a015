"""The JAX feed on a GPU: batches are there, in memory of their own, and whatever uses them waits until they are."""

import numpy as np
import pytest

import input_workers as iw
from input_workers.contracts import ArraySpec
from input_workers.leases import SlotPool

jax = pytest.importorskip("jax")
from feeds.jax_conformance import JaxConformance  # noqa: E402  needs JAX

if jax.default_backend() != "gpu":
    pytest.skip("JAX sees no GPU", allow_module_level=True)
from input_workers.feeds.jax_feed import JaxFeed  # noqa: E402

pytestmark = [pytest.mark.jax, pytest.mark.gpu]
ROWS, ROW = 64, 128 * 1024  # batches of 32 MiB of float32


class TestJaxOnTheGpu(JaxConformance):
    feed = "jax:gpu:0"
    shares_slots = False

    def test_arrays_are_on_the_gpu(self):
        feed, pool = self.opened(np.float32, np.int64)
        arrays = feed.receive(feed.send(pool.lease()))
        assert all(array.devices() == {jax.devices("gpu")[0]} for array in arrays)
        feed.close()


class TestJaxOverTheGpus(JaxConformance):
    """All that there are, one included."""

    feed = jax.sharding.NamedSharding(jax.make_mesh((1,), ("rows",), devices=jax.devices("gpu")[:1]),
                                      jax.sharding.PartitionSpec("rows"))  # fmt: skip
    shares_slots = False

    def make_feed(self):
        return JaxFeed(self.feed)


def opened():
    feed = JaxFeed(jax.devices("gpu")[0])
    spec = ArraySpec((ROW,), np.float32)
    feed.open([spec], ROWS)
    return feed, SlotPool([spec], [0], ROWS, 4)


def test_computations_read_right_values_while_slots_are_filled_again_as_soon_as_they_come_back():
    feed, pool = opened()
    total = jax.jit(lambda x: x.astype(np.float64).sum())
    sums = []
    for value in range(40):
        slot = pool.lease()
        slot.arrays[0][...] = value
        ticket = feed.send(slot)
        del slot
        (array,) = feed.receive(ticket)
        sums.append(total(array))
        del array, ticket
    assert [float(each) for each in sums] == [value * ROWS * ROW for value in range(40)]
    feed.close()


def test_a_batch_is_ready_when_its_copy_is_done():
    feed, pool = opened()
    ticket = feed.send(pool.lease())
    jax.block_until_ready(ticket)
    assert feed.is_ready(ticket)
    feed.close()


def test_a_batch_that_was_donated_does_not_disturb_the_next():
    feed, pool = opened()
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    for value in range(4):
        slot = pool.lease()
        slot.arrays[0][...] = value
        (array,) = feed.receive(feed.send(slot))
        assert float(step(array)[0, 0]) == value + 1
    feed.close()


def test_a_gpu_without_memory_fails_the_source_with_sizes_and_others_go_on():
    stats = jax.devices("gpu")[0].memory_stats()
    hog = []
    part = (stats["bytes_limit"] - stats["bytes_in_use"]) // 4
    while part > 1024 * 1024:  # all but less than a batch
        try:
            hog.append(jax.block_until_ready(jax.device_put(jax.numpy.zeros(part, np.uint8), jax.devices("gpu")[0])))
        except jax.errors.JaxRuntimeError:
            part //= 2
    coordinator = iw.GlobalCoordinator()
    rows, small = np.ones((ROWS, ROW), np.float32), np.ones(4, np.float32)
    numbers = iter(range(10))

    def fetch(worker_id, batch_size):
        if next(numbers, None) is None:
            raise iw.EndOfData
        return [rows]

    iw.init_data_input_workers("jax:gpu:0", ["data"], fetch, ROWS, 1, "large", coordinator=coordinator)
    iw.init_data_input_workers("jax:cpu:0", ["data"], lambda *_: [small], 4, 1, "small", coordinator=coordinator)
    with coordinator:
        with pytest.raises(iw.FeedFailed, match=r"a batch of 64 rows, 33,554,432 bytes, could not be sent") as caught:
            list(coordinator["large"])
        with pytest.raises(iw.FeedFailed, match=r"is out of memory: wanted 33,554,432 bytes .* bytes are free"):
            raise caught.value.__cause__
        assert coordinator["large"].stats().rows_dropped["device_error"] == ROWS
        assert coordinator["small"].next_batch().data.tolist() == [1.0] * 4
    del hog
