"""The PyTorch feed: memory of the host without a copy, never another dtype, never another device."""

import numpy as np
import pytest
from feeds.feed_conformance import aligned, filled

import input_workers as iw
from input_workers.contracts import Slot

torch = pytest.importorskip("torch")
from feeds.torch_conformance import TorchConformance  # noqa: E402  needs PyTorch

from input_workers.feeds.torch_feed import make_torch_feed  # noqa: E402

pytestmark = pytest.mark.torch


class TestTorchOnTheHost(TorchConformance):
    feed = "torch:cpu"

    @pytest.mark.parametrize("offset", [0, 1, 4, 60])
    def test_operations_on_memory_of_any_alignment_are_right(self, offset):
        feed = self.make_feed()
        feed.open([iw.ArraySpec((33,), np.float32)], 40)
        array = aligned(np.ones((40, 33), np.float32), offset)
        (tensor,) = feed.receive(feed.send(Slot([array], 40, 40)))
        assert float((tensor * 2).sum()) == 2640.0

    def test_every_view_of_a_tensor_holds_the_memory(self):
        feed, pool = self.opened(np.float32)
        slot = pool.lease()
        (wanted,) = filled(slot, 5)
        (tensor,) = feed.receive(feed.send(slot))
        rows = torch.utils.data.default_convert(tensor)[2:].flatten().view(-1, 3).detach().numpy()
        del slot, tensor
        for number in range(6):
            filled(pool.lease(), 100 + number)
        assert rows.tolist() == wanted[2:].tolist()

    @pytest.mark.parametrize("dtype", [">f4", ">i8", "U3", "S7", "M8[s]", "longdouble", "V4", "V2"])
    def test_a_dtype_that_pytorch_lacks_is_refused_and_never_cast(self, dtype):
        with pytest.raises(iw.SpecMismatch, match=r"input 0: got dtype .*, which PyTorch cannot hold as it is; wanted"):
            self.make_feed().open([iw.ArraySpec((), dtype)], 8)


class TestTorchByDefault(TorchConformance):
    """The host, as PyTorch itself has it, unless it was told otherwise."""

    feed = "torch"

    def test_it_is_pytorchs_default_device_when_the_source_is_started(self):
        torch.set_default_device("meta")
        try:
            with pytest.raises(iw.ConfigError, match=r"feed 'torch': there is no such device, or no feed for it"):
                make_torch_feed("")
        finally:
            torch.set_default_device(None)


@pytest.mark.parametrize("device", ["cuda:99", "cpu:1", "mps", "nonsense", "cuda:-1"])
def test_a_device_that_is_not_there_is_an_error_at_start_which_lists_those_that_are(device):
    coordinator = iw.GlobalCoordinator()
    iw.init_data_input_workers(f"torch:{device}", ["data"], lambda *_: [np.zeros(4)], 4, coordinator=coordinator)
    with pytest.raises(iw.ConfigError, match=rf"'torch:{device}'.*wanted one of 'torch:cpu'"):
        coordinator.start()
    assert coordinator.stats()["train"].fetchers_alive == 0


def test_a_model_learns_from_what_is_delivered():
    """Gradients and writing in place. (Not with `torch.optim`, whose Triton brings an LLVM that TensorFlow's cannot bear.)"""
    numbers = iter(range(60))

    def fetch(worker_id, batch_size):
        number = next(numbers, None)
        if number is None:
            raise iw.EndOfData
        data = np.random.default_rng(number).random((7, 3), np.float32)
        return [data, data @ np.array([1.0, -2.0, 3.0], np.float32)]

    weights = torch.zeros(3, requires_grad=True)
    coordinator = iw.GlobalCoordinator()
    iw.init_data_input_workers("torch:cpu", ["data", "label"], fetch, 8, 1, coordinator=coordinator)
    losses = []
    with coordinator:
        for data, label in coordinator["train"]:
            data.sub_(0.5).add_(0.5)
            loss = ((data @ weights - label) ** 2).mean()
            (gradient,) = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                weights -= 0.5 * gradient
            losses.append(loss.item())
    assert len(losses) == 52
    assert sum(losses[-5:]) < sum(losses[:5]) / 10
