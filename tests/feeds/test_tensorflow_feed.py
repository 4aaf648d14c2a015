"""The TensorFlow feed: memory of the host without a copy where that is safe, never another dtype, never another device."""

import numpy as np
import pytest
from feeds.feed_conformance import aligned, rows_of

import input_workers as iw
from input_workers.contracts import Slot

tf = pytest.importorskip("tensorflow")
from feeds.tensorflow_conformance import TensorFlowConformance  # noqa: E402  needs TensorFlow

from input_workers.feeds.tensorflow_feed import TensorFlowFeed  # noqa: E402

pytestmark = pytest.mark.tensorflow


class TestTensorFlowOnTheHost(TensorFlowConformance):
    feed = "tensorflow:/CPU:0"

    def test_tensors_are_on_the_host(self):
        feed, pool = self.opened(np.float32)
        (tensor,) = feed.receive(feed.send(pool.lease()))
        assert tensor.device.endswith("CPU:0")

    def test_bfloat16_is_delivered(self):
        feed, pool = self.opened(tf.bfloat16.as_numpy_dtype)
        slot = pool.lease()
        slot.arrays[0][...] = 1.5
        (tensor,) = feed.receive(feed.send(slot))
        assert tensor.dtype == tf.bfloat16
        assert tensor.numpy().astype(np.float32).tolist() == [[1.5] * 3] * 8

    @pytest.mark.parametrize("offset", [0, 4])
    def test_arrays_that_are_copied_are_read_before_send_returns(self, offset):
        feed = self.make_feed()
        feed.open([iw.ArraySpec((3,), "S7")], 8)
        array = aligned(rows_of(0, 8, "S7"), offset)
        (tensor,) = feed.receive(feed.send(Slot([array], 8, 8)))
        array[...] = b"other"
        assert self.same(tensor, rows_of(0, 8, "S7"))

    def test_operations_on_unaligned_memory_do_not_end_the_process(self):
        feed = self.make_feed()
        feed.open([iw.ArraySpec((33,), np.float32)], 40)
        for offset in range(0, 64, 4):
            array = aligned(np.ones((40, 33), np.float32), offset)
            (tensor,) = feed.receive(feed.send(Slot([array], 40, 40)))
            assert float(tf.reduce_sum(tensor * 2.0)) == 2640.0

    @pytest.mark.parametrize("dtype", [">f4", ">i8", "U3", "M8[s]", "longdouble", "V4"])
    def test_a_dtype_that_tensorflow_lacks_is_refused_and_never_cast(self, dtype):
        with pytest.raises(iw.SpecMismatch, match=r"input 0: got dtype .*; wanted"):
            self.make_feed().open([iw.ArraySpec((), dtype)], 8)

    def test_a_source_with_such_a_dtype_fails_and_says_why(self):
        coordinator = iw.GlobalCoordinator()
        iw.init_data_input_workers(self.feed, ["data"], lambda *_: [np.zeros(4, ">f4")], 4, 1, coordinator=coordinator)
        with coordinator:
            with pytest.raises(iw.FeedFailed, match="could not be opened") as caught:
                coordinator["train"].next_batch()
            assert isinstance(caught.value.__cause__, iw.SpecMismatch)


class TestTensorFlowByDefault(TensorFlowConformance):
    """Where TensorFlow puts things by itself: here, the host, unless there is a GPU."""

    feed = "tensorflow"
    shares_slots = not tf.config.list_physical_devices("GPU")


@pytest.mark.parametrize("device", ["/GPU:99", "/CPU:1", "nonsense"])
def test_a_device_that_is_not_there_is_an_error_at_start_which_lists_those_that_are(device):
    coordinator = iw.GlobalCoordinator()
    iw.init_data_input_workers(f"tensorflow:{device}", ["data"], lambda *_: [np.zeros(4)], 4, coordinator=coordinator)
    with pytest.raises(iw.ConfigError, match=rf"'tensorflow:{device}'.*wanted one of 'tensorflow:/CPU:0'"):
        coordinator.start()
    assert coordinator.stats()["train"].fetchers_alive == 0


def test_a_device_may_be_named_as_tensorflow_allows():
    assert {TensorFlowFeed(name).device for name in ("/CPU:0", "CPU:0", "/cpu:0", "/device:CPU:0", "/cpu")} == {"/CPU:0"}
