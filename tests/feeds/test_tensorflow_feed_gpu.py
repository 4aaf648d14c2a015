"""The TensorFlow feed on a GPU: batches are there, in memory of their own, before the trainer asks."""

import numpy as np
import pytest
from feeds.feed_conformance import DTYPES

tf = pytest.importorskip("tensorflow")
if not tf.config.list_physical_devices("GPU"):
    pytest.skip("TensorFlow sees no GPU", allow_module_level=True)
from feeds.tensorflow_conformance import TensorFlowConformance  # noqa: E402  needs TensorFlow

pytestmark = [pytest.mark.tensorflow, pytest.mark.gpu]


class TestTensorFlowOnTheGpu(TensorFlowConformance):
    feed = "tensorflow:/GPU:0"
    shares_slots = False
    dtypes = tuple(dtype for dtype in DTYPES if dtype != "S7")  # strings stay on the host

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
