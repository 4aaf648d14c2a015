"""The TensorFlow feed on a GPU: batches are there, in memory of their own, before the trainer asks."""

import numpy as np
import pytest
from feeds.feed_conformance import NUMBERS

import input_workers as iw
from input_workers.contracts import ArraySpec
from input_workers.leases import SlotPool

tf = pytest.importorskip("tensorflow")
if not tf.config.list_physical_devices("GPU"):
    pytest.skip("TensorFlow sees no GPU", allow_module_level=True)
from feeds.tensorflow_conformance import TensorFlowConformance  # noqa: E402  needs TensorFlow

pytestmark = [pytest.mark.tensorflow, pytest.mark.gpu]


class TestTensorFlowOnTheGpu(TensorFlowConformance):
    feed = "tensorflow:/GPU:0"
    shares_slots = False
    dtypes = NUMBERS  # strings stay on the host

    def test_tensors_are_on_the_gpu(self):
        feed, pool = self.opened(np.float32, np.int64)
        assert all(tensor.device.endswith("GPU:0") for tensor in feed.receive(feed.send(pool.lease())))

    def test_int32_stays_in_host_memory_and_holds_its_slot(self):
        feed, pool = self.opened(np.int32)
        slot = pool.lease()
        slot.arrays[0][...] = 5
        (tensor,) = feed.receive(feed.send(slot))
        del slot
        for _ in range(6):
            pool.lease().arrays[0][...] = 6
        assert tensor.numpy().tolist() == [[5] * 3] * 8


ROWS, ROW = 64, 128 * 1024  # batches of 32 MiB of float32


def test_operations_read_right_values_while_slots_are_filled_again_as_soon_as_they_come_back():
    feed = TestTensorFlowOnTheGpu().make_feed()
    spec = ArraySpec((ROW,), np.float32)
    feed.open([spec], ROWS)
    pool = SlotPool([spec], [0], ROWS, 4)
    sums = []
    for value in range(40):
        slot = pool.lease()
        slot.arrays[0][...] = value
        (tensor,) = feed.receive(feed.send(slot))
        del slot
        with tf.device("/GPU:0"):
            sums.append(tf.reduce_sum(tf.cast(tensor, tf.float64)))
        del tensor
    assert [float(each) for each in sums] == [value * ROWS * ROW for value in range(40)]
    feed.close()


def test_a_gpu_without_memory_fails_the_source_with_sizes_and_others_go_on():
    hog, part = [], 2**36
    while part > 2**20:  # all but less than a batch
        try:
            with tf.device("/GPU:0"):
                hog.append(tf.zeros(part, tf.uint8))
        except tf.errors.ResourceExhaustedError:
            part //= 2
    coordinator = iw.GlobalCoordinator()
    rows, small = np.ones((ROWS, ROW), np.float32), np.ones(4, np.float32)
    for feed, name, array in (("tensorflow:/GPU:0", "large", rows), ("tensorflow:/CPU:0", "small", small)):
        iw.init_data_input_workers(
            feed, ["data"], lambda *_, array=array: [array], len(array), 1, name, coordinator=coordinator
        )
    with coordinator:
        with pytest.raises(iw.FeedFailed, match=r"a batch of 64 rows, 33,554,432 bytes, could not be sent") as caught:
            coordinator["large"].next_batch()
        with pytest.raises(iw.FeedFailed, match="/GPU:0 is out of memory: wanted 33,554,432 bytes"):
            raise caught.value.__cause__
        assert coordinator["large"].stats().rows_dropped["device_error"] == ROWS
        assert coordinator["small"].next_batch().data.numpy().tolist() == [1.0] * 4
    del hog
