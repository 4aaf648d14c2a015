"""The PyTorch feed on a GPU: copies that go on by themselves, never read before they are done, slots never used before."""

import gc

import numpy as np
import pytest
from feeds.feed_conformance import filled

import input_workers as iw
from input_workers.contracts import ArraySpec, Slot
from input_workers.leases import SlotPool

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("PyTorch sees no GPU", allow_module_level=True)
from feeds.torch_conformance import TorchConformance  # noqa: E402  needs PyTorch

from input_workers.feeds.torch_feed import COPIES_UNDER_WAY, TorchCudaFeed, make_torch_feed  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.gpu]
CYCLES = 400_000_000  # about a fifth of a second of a GPU
ROWS, ROW = 64, 128 * 1024  # batches of 32 MiB of float32


class TestTorchOnTheGpu(TorchConformance):
    feed = "torch:cuda:0"
    shares_slots = False

    def let_go(self):
        torch.cuda.synchronize()

    def test_a_slot_is_used_again_when_its_batch_has_died_and_not_before(self):
        """Here: when its copy is done. What is held is on the GPU, and the feed notices with the next batches."""
        feed, pool = self.opened(np.float32)
        addresses = set()
        for number in range(20):
            slot = pool.lease()
            (wanted,) = filled(slot, number)
            addresses.add(slot.arrays[0].ctypes.data)
            (got,) = feed.receive(feed.send(slot))
            del slot
            assert self.same(got, wanted)
        assert len(addresses) <= COPIES_UNDER_WAY + 1
        feed.close()

    def test_tensors_are_on_the_gpu_and_slots_are_page_locked(self):
        feed, pool = self.opened(np.float32)
        slot = pool.lease()
        assert torch.from_numpy(slot.arrays[0]).is_pinned()
        (tensor,) = feed.receive(feed.send(slot))
        assert tensor.device == torch.device("cuda", 0)
        feed.close()


def opened():
    feed = make_torch_feed("cuda:0")
    spec = ArraySpec((ROW,), np.float32)
    feed.open([spec], ROWS)
    return feed, SlotPool([spec], [0], ROWS, 4, feed.slot_memory)


def send(feed, pool, value, slowly=True):
    """Fill a slot and send it; its copy takes about a fifth of a second, because its stream does something else first."""
    slot = pool.lease()
    slot.arrays[0][...] = value
    if slowly:
        hold_up(feed)
    return feed.send(slot)


def hold_up(feed):
    with torch.cuda.stream(feed._stream):
        torch.cuda._sleep(CYCLES)


def test_the_feed_without_a_number_is_the_current_gpu():
    assert make_torch_feed("cuda").device == torch.device("cuda", torch.cuda.current_device())


@pytest.mark.parametrize("stream", [None, "its own"])
def test_what_the_trainer_starts_next_waits_for_a_slow_copy_and_the_trainer_does_not(stream):
    feed, pool = opened()
    own = torch.cuda.Stream() if stream else torch.cuda.current_stream()
    for value in range(5):
        ticket = send(feed, pool, value)
        assert not feed.is_ready(ticket)
        with torch.cuda.stream(own):
            (tensor,) = feed.receive(ticket)
            total = tensor.sum(dtype=torch.float64)
        assert not feed.is_ready(ticket)  # nobody has waited yet
        own.synchronize()
        assert total.item() == value * ROWS * ROW
        assert feed.is_ready(ticket)
    feed.close()


def test_a_slot_is_not_written_to_before_its_copy_is_done():
    feed, pool = opened()
    sums = []
    for value in range(12):
        (tensor,) = feed.receive(send(feed, pool, value))  # fills a slot as soon as there is one
        sums.append(tensor.sum(dtype=torch.float64))
        del tensor
    assert [each.item() for each in sums] == [value * ROWS * ROW for value in range(12)]
    feed.close()


def test_memory_that_the_trainer_has_dropped_is_not_used_again_before_its_stream_is_done():
    feed, pool = opened()
    sums = []
    for value in range(12):
        (tensor,) = feed.receive(send(feed, pool, value, slowly=False))
        torch.cuda._sleep(CYCLES // 10)  # the trainer is behind: its sum comes long after the tensor has died
        sums.append(tensor.sum(dtype=torch.float64))
        del tensor
    assert [each.item() for each in sums] == [value * ROWS * ROW for value in range(12)]
    feed.close()


def test_few_copies_are_under_way_and_close_waits_for_them():
    feed, pool = opened()
    tickets = []
    for value in range(6):
        tickets.append(send(feed, pool, value))
        assert len(feed._copying) <= COPIES_UNDER_WAY
    feed.close()
    assert all(feed.is_ready(ticket) for ticket in tickets)


def test_batches_are_counted_that_were_received_before_their_copy_was_done():
    class Slow(TorchCudaFeed):
        def send(self, slot):
            hold_up(self)
            return super().send(slot)

    coordinator = iw.GlobalCoordinator()
    rows = np.ones((ROWS, ROW), np.float32)
    iw.init_data_input_workers(Slow(0), ["data"], lambda *_: [rows], ROWS, 1, device_queue_depth=1, coordinator=coordinator)
    with coordinator:
        for _ in range(30):
            coordinator["train"].next_batch()
        stats = coordinator["train"].stats()
    assert stats.batches_not_ready > 15
    assert stats.verdict == "feed", stats.verdict_text


def test_a_gpu_without_memory_fails_the_source_with_sizes_and_others_go_on():
    torch.cuda.set_per_process_memory_fraction(0.0001, 0)
    coordinator = iw.GlobalCoordinator()
    rows = np.ones((ROWS, ROW), np.float32)
    small = np.ones(4, np.float32)
    try:
        iw.init_data_input_workers("torch:cuda:0", ["data"], lambda *_: [rows], ROWS, 1, "large", coordinator=coordinator)
        iw.init_data_input_workers("torch:cpu", ["data"], lambda *_: [small], 4, 1, "small", coordinator=coordinator)
        torch.cuda.empty_cache()
        with coordinator:
            with pytest.raises(iw.FeedFailed, match=r"a batch of 64 rows, 33,554,432 bytes, could not be sent") as caught:
                coordinator["large"].next_batch()
            cause = caught.value.__cause__
            assert isinstance(cause, iw.FeedFailed)
            assert isinstance(cause.__cause__, torch.cuda.OutOfMemoryError)
            with pytest.raises(iw.FeedFailed, match=r"cuda:0 is out of memory: wanted 33,554,432 bytes .* bytes are free"):
                raise cause
            assert coordinator["large"].stats().rows_dropped["device_error"] == ROWS
            assert coordinator["small"].next_batch().data.tolist() == [1.0] * 4
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)


def test_memory_of_the_gpu_is_bounded_and_given_back():
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(0)
    torch.cuda.reset_peak_memory_stats(0)
    coordinator, depth = iw.GlobalCoordinator(), 3
    rows = np.ones((ROWS, ROW), np.float32)
    iw.init_data_input_workers(
        "torch:cuda:0", ["data"], lambda *_: [rows], ROWS, 1, device_queue_depth=depth, coordinator=coordinator
    )
    with coordinator:
        for _ in range(50):
            batch = coordinator["train"].next_batch()
            torch.cuda.synchronize()
    # What waits, one being sent, the trainer's, and the one before it.
    assert torch.cuda.max_memory_allocated(0) - before <= (depth + 3) * rows.nbytes
    del batch, coordinator
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated(0) == before


def test_arrays_that_are_not_page_locked_are_copied_right():
    feed, _ = opened()
    array = np.full((ROWS, ROW), 3, np.float32)
    (tensor,) = feed.receive(feed.send(Slot([array], ROWS, ROWS)))
    del array
    assert tensor.sum(dtype=torch.float64).item() == 3 * ROWS * ROW
    feed.close()
