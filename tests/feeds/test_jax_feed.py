"""The JAX feed: memory of the host without a copy, never another dtype, over one device or several."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from feeds.feed_conformance import filled, rows_of

import input_workers as iw
from input_workers.leases import SlotPool

jax = pytest.importorskip("jax")
from feeds.jax_conformance import JaxConformance  # noqa: E402  needs JAX

from input_workers.feeds.jax_feed import JaxFeed  # noqa: E402

P = jax.sharding.PartitionSpec
CPUS = jax.devices("cpu")
pytestmark = pytest.mark.jax


def sharding(*parts, shape=(4,), names=("rows",)):
    return jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(CPUS[: np.prod(shape)]).reshape(shape), names), P(*parts))


class TestJaxByDefault(JaxConformance):
    feed = "jax"
    shares_slots = jax.default_backend() == "cpu"

    def test_arrays_are_where_jax_puts_things_and_may_be_used_with_those_of_any_device(self):
        feed, pool = self.opened(np.float32)
        (array,) = feed.receive(feed.send(pool.lease()))
        assert array.devices() == jax.numpy.zeros(1).devices()
        assert (array + jax.device_put(1.0, CPUS[2])).devices() == {CPUS[2]}

    def test_the_default_device_may_be_another(self):
        jax.config.update("jax_default_device", CPUS[3])
        try:
            feed, pool = self.opened(np.float32)
            (array,) = feed.receive(feed.send(pool.lease()))
            assert array.devices() == {CPUS[3]}
        finally:
            jax.config.update("jax_default_device", None)


class TestJaxOnOneDevice(JaxConformance):
    feed = "jax:cpu:2"

    def test_arrays_are_on_that_device(self):
        feed, pool = self.opened(np.float32)
        (array,) = feed.receive(feed.send(pool.lease()))
        assert array.devices() == {CPUS[2]}

    def test_a_batch_that_is_donated_to_a_computation_leaves_its_slot_alone(self):
        feed, pool = self.opened(np.float32)
        slot = pool.lease()
        (wanted,) = filled(slot, 5)
        (array,) = feed.receive(feed.send(slot))
        (kept,) = slot.arrays
        result = jax.jit(lambda x: x + 1, donate_argnums=0)(array).block_until_ready()
        assert array.is_deleted()
        assert kept.tolist() == wanted.tolist()
        assert np.asarray(result).tolist() == (wanted + 1).tolist()
        (other,) = feed.receive(feed.send(slot))  # which looks whether the one before has arrived
        assert feed.is_ready([other.block_until_ready()])
        feed.close()

    @pytest.mark.parametrize("dtype", [">f4", ">i8", "U3", "S7", "M8[s]", "longdouble", "V4"])
    def test_a_dtype_that_jax_lacks_is_refused_and_never_cast(self, dtype):
        with pytest.raises(iw.SpecMismatch, match=r"input 0: got dtype .*, which JAX cannot hold as it is; wanted"):
            self.make_feed().open([iw.ArraySpec((), dtype)], 8)

    @pytest.mark.parametrize(("dtype", "short"), [("int64", "int32"), ("float64", "float32"), ("complex128", "complex64")])
    def test_64_bits_are_refused_where_jax_would_halve_them(self, dtype, short):
        jax.config.update("jax_enable_x64", False)
        try:
            coordinator = iw.GlobalCoordinator()
            iw.init_data_input_workers(self.feed, ["label"], lambda *_: [np.zeros(4, dtype)], 4, coordinator=coordinator)
            with coordinator:
                with pytest.raises(iw.FeedFailed, match="could not be opened") as caught:
                    coordinator["train"].next_batch()
                assert isinstance(caught.value.__cause__, iw.SpecMismatch)
                remedy = rf"input 0: got dtype {dtype}, .*'jax_enable_x64', True\).* or {short}: array.astype\(np.{short}\)"
                assert caught.match("") is not None
                with pytest.raises(iw.SpecMismatch, match=remedy):
                    raise caught.value.__cause__
        finally:
            jax.config.update("jax_enable_x64", True)


class ShardedConformance(JaxConformance):
    odd_shapes = ((0, 3), (4, 0), (4, 3), (8,))

    def make_feed(self):
        return JaxFeed(self.feed)


class TestJaxOverFourDevices(ShardedConformance):
    feed = sharding("rows")

    def test_each_device_gets_its_rows(self):
        feed, pool = self.opened(np.float32, np.int64)
        slot = pool.lease()
        wanted = filled(slot, 3)
        for array, want in zip(feed.receive(feed.send(slot)), wanted, strict=True):
            assert array.sharding.is_equivalent_to(self.feed, array.ndim)
            for number, shard in enumerate(array.addressable_shards):
                assert shard.device == CPUS[number]
                assert np.asarray(shard.data).tolist() == want[number * 2 : number * 2 + 2].tolist()

    def test_rows_that_are_large_enough_are_not_copied(self):
        feed = self.make_feed()
        spec = iw.ArraySpec((64,), np.float32)
        feed.open([spec], 8)
        pool = SlotPool([spec], [0], 8, 4)
        slot = pool.lease()
        slot.arrays[0][...] = np.arange(64)
        (array,) = feed.receive(feed.send(slot))
        begin = slot.arrays[0].ctypes.data
        assert [shard.data.unsafe_buffer_pointer() - begin for shard in array.addressable_shards] == [0, 512, 1024, 1536]

    def test_a_computation_over_all_devices_gives_the_right_sum(self):
        coordinator = iw.GlobalCoordinator()
        numbers = iter(range(12))

        def fetch(worker_id, batch_size):
            first = next(numbers, None)
            if first is None:
                raise iw.EndOfData
            return [rows_of(first * 10, 10, np.float32)]

        iw.init_data_input_workers(self.feed, ["data"], fetch, 8, 1, coordinator=coordinator)
        total = jax.jit(lambda x: x.sum())
        with coordinator:
            assert sum(float(total(batch.data)) for batch in coordinator["train"]) == rows_of(0, 120, np.float32).sum()

    @pytest.mark.parametrize("rows", [6, 10, 1])
    def test_a_batch_size_that_does_not_divide_is_an_error_at_once(self, rows):
        coordinator = iw.GlobalCoordinator()
        with pytest.raises(iw.ConfigError, match=rf"batch_size: got {rows}, which cannot be dealt to 4 devices"):
            iw.init_data_input_workers(self.feed, ["data"], lambda *_: None, rows, coordinator=coordinator)
        iw.init_data_input_workers("numpy", ["data"], lambda *_: None, rows, coordinator=coordinator)
        with pytest.raises(iw.ConfigError, match="cannot be dealt to 4 devices"):
            coordinator.reset_data_input("", "train", self.feed, rows)

    def test_a_last_batch_that_does_not_divide_fails_with_the_remedy(self):
        coordinator = iw.GlobalCoordinator()
        data = iw.sources.Arrays(np.arange(22))
        iw.init_data_input_workers(self.feed, ["data"], iw.Stream(data), 8, last_batch="keep", coordinator=coordinator)
        with coordinator:
            assert [len(coordinator["train"].next_batch().data) for _ in range(2)] == [8, 8]
            with pytest.raises(iw.FeedFailed, match="a batch of 6 rows, 48 bytes, could not be sent") as caught:
                coordinator["train"].next_batch()
            assert "last_batch='drop' or 'pad'" in str(caught.value.__cause__)
            assert coordinator["train"].stats().rows_dropped["device_error"] == 6


class TestJaxOverAMesh(ShardedConformance):
    """Rows over one axis of a mesh, the same on both devices of the other."""

    feed = sharding("rows", shape=(2, 2), names=("rows", "model"))

    def test_the_rows_may_lie_along_another_axis(self):
        feed = sharding(None, "rows")
        coordinator = iw.GlobalCoordinator()
        iw.init_data_input_workers(feed, ["data"], lambda *_: [np.ones((3, 5))], 8, batch_axes=1, coordinator=coordinator)
        with coordinator:
            array = coordinator["train"].next_batch().data
        assert {shard.data.shape for shard in array.addressable_shards} == {(3, 2)}
        with pytest.raises(iw.ConfigError, match="axis 1"):
            iw.init_data_input_workers(feed, ["data"], lambda *_: None, 6, batch_axes=1, coordinator=iw.GlobalCoordinator())
        by_features = sharding("rows")  # says nothing about the rows, which lie along axis 1
        iw.init_data_input_workers(by_features, ["data"], lambda *_: None, 6, batch_axes=1, coordinator=iw.GlobalCoordinator())


@pytest.mark.parametrize("device", ["gpu:99", "cpu:4", "cpu:-1", "cpu:x", "nonsense"])
def test_a_device_that_is_not_there_is_an_error_at_start_which_lists_those_that_are(device):
    coordinator = iw.GlobalCoordinator()
    iw.init_data_input_workers(f"jax:{device}", ["data"], lambda *_: [np.zeros(4)], 4, coordinator=coordinator)
    with pytest.raises(iw.ConfigError, match=rf"'jax:{device}'.*wanted one of .*'jax:cpu:0'.*'jax:cpu:3'"):
        coordinator.start()
    assert coordinator.stats()["train"].fetchers_alive == 0


def test_processes_that_train_together_each_bring_their_rows():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    child = pathlib.Path(__file__).with_name("jax_process.py")
    command = [sys.executable, "-W", "error", str(child)]
    root = pathlib.Path(iw.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    both = [
        subprocess.Popen(
            [*command, str(number), "2", address], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for number in range(2)
    ]
    try:
        for each in both:
            output, _ = each.communicate(timeout=120)
            assert each.returncode == 0, output
    finally:
        for each in both:
            each.kill()
            each.wait()
            each.stdout.close()


WITHOUT_MEMORY = """
import resource
import numpy as np
from feeds import jax_conformance  # four devices
import jax
import input_workers as iw
from input_workers.feeds.jax_feed import JaxFeed
from input_workers.leases import SlotPool

mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")), ("rows",))
feed = JaxFeed(jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows")))
spec = iw.ArraySpec((2**26 + 1,), np.uint8)  # all rows but the first lie unaligned, and are copied
feed.open([spec], 4)
slot = SlotPool([spec], [0], 4, 1).lease()
with open("/proc/self/statm") as file:
    mapped = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**25, mapped + 2**25))
try:
    jax.block_until_ready(feed.send(slot))
except iw.FeedFailed as error:
    assert "is out of memory: wanted 268,435,460 bytes for a batch of 4 rows; lower batch_size" in str(error), error
    assert isinstance(error.__cause__, jax.errors.JaxRuntimeError), error.__cause__
else:
    raise AssertionError("there was memory")
"""


def test_without_memory_the_error_says_how_much_was_wanted():
    root = pathlib.Path(iw.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", WITHOUT_MEMORY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
