"""Slots in, PyTorch tensors out: on the host the slot's own memory, on a GPU a copy that goes on by itself.

Imports PyTorch: loaded when a source with this feed is started.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from input_workers.contracts import ArraySpec, DeviceFeed, Slot
from input_workers.errors import ConfigError
from input_workers.feeds.refusals import dtype_refused, no_room

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["TorchCudaFeed", "TorchFeed", "make_torch_feed"]

# What NumPy has from ml_dtypes only. PyTorch's own conversion refuses it, so it goes through integers of the same size.
BY_NAME = ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
INTEGERS: dict[int, tuple[Any, torch.dtype]] = {1: (np.uint8, torch.uint8), 2: (np.uint16, torch.uint16)}

# Copies under way: while one runs the next is ready to go, and the enqueuer fills a third slot.
COPIES_UNDER_WAY = 2


class TorchFeed:
    """Delivers tensors on the host, which share the slot's memory and hold its lease.

    The trainer may write to them and hold them as long as it likes: the memory is used again when PyTorch has dropped the
    last tensor over it. What is read-only or not contiguous is copied. The dtypes of ml_dtypes that PyTorch has, such as
    bfloat16, are delivered as these.
    """

    chunk_alignment: int | None = 1

    def __init__(self) -> None:
        self._dtypes: list[torch.dtype | None] = []  # for each input; None: as NumPy's dtype says

    def open(self, specs: Sequence[ArraySpec], batch_size: int) -> None:
        """Choose for each input how it becomes a tensor.

        Raises:
            SpecMismatch: PyTorch has no such dtype; it is never cast to another.
        """
        self._dtypes = [_dtype_by_name(index, spec.dtype) for index, spec in enumerate(specs)]

    def send(self, slot: Slot) -> Any:
        """Return the batch's tensors, which hold what they share with the slot."""
        return [_share(array, dtype) for array, dtype in zip(slot.arrays, self._dtypes, strict=True)]

    def receive(self, ticket: Any) -> Sequence[torch.Tensor]:
        """Return the same tensors."""
        tensors: Sequence[torch.Tensor] = ticket
        return tensors

    def to_numpy(self, tensor: torch.Tensor) -> NDArray[Any]:
        """Return the tensor as an array, which shares its memory if that is the host's."""
        name = str(tensor.dtype).removeprefix("torch.")
        if name not in BY_NAME:
            return np.asarray(tensor.cpu().numpy())
        import ml_dtypes  # the array that the tensor came from had its dtype from there

        return np.asarray(tensor.cpu().view(INTEGERS[tensor.itemsize][1]).numpy().view(getattr(ml_dtypes, name)))

    def close(self) -> None:
        """Nothing was taken that the tensors do not give back themselves."""


class TorchCudaFeed(TorchFeed):
    """Delivers tensors on a GPU. The copy runs on a stream of its own, from page-locked slots, ahead of the trainer.

    `send` starts the copy and notes an event behind it; a slot is used again when its event has passed. Where two copies are
    under way, `send` waits for the first. `receive` lets the trainer's current stream wait for the event, not the trainer:
    whatever it starts there next finds the values, and the tensors' memory is not used again before that stream is done
    with it. A trainer that uses other streams besides must let them wait for this one, as with any tensor.

    Page-locked memory is PyTorch's, rounded up by it to powers of two, and kept by it for its next use when it comes back.

    Args:
        index: of the GPU; None: PyTorch's current one.
    """

    chunk_alignment = None  # chunks are not page-locked

    def __init__(self, index: int | None = None) -> None:
        super().__init__()
        self.device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        self._stream: Any = None
        # What was sent, the event behind its copy, and its arrays, held so that nobody fills them meanwhile.
        self._copying: collections.deque[tuple[Any, Sequence[NDArray[Any]]]] = collections.deque()

    def open(self, specs: Sequence[ArraySpec], batch_size: int) -> None:
        """Make the stream. Raises SpecMismatch: PyTorch has no such dtype."""
        super().open(specs, batch_size)
        self._stream = torch.cuda.Stream(self.device)

    def slot_memory(self, nbytes: int) -> NDArray[np.uint8]:
        """Return page-locked memory."""
        with torch.cuda.device(self.device):  # or PyTorch would use the first GPU, too
            return np.asarray(torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True).numpy())

    def send(self, slot: Slot) -> Any:
        """Start the copy; return the tensors, which are not to be used yet, and the event that says when.

        Raises:
            FeedFailed: the GPU has no memory for the batch.
        """
        copying = self._copying
        while copying and (len(copying) >= COPIES_UNDER_WAY or copying[0][0].query()):
            event, _ = copying[0]
            event.synchronize()
            del copying[0]
        hosts = super().send(slot)
        event = torch.cuda.Event(blocking=True)  # whoever waits for it sleeps
        try:
            with torch.cuda.stream(self._stream):  # and the memory is allocated on it
                tensors = [host.to(self.device, non_blocking=True) for host in hosts]
                event.record()
        except torch.cuda.OutOfMemoryError as error:
            self._stream.synchronize()  # some arrays may be on their way
            raise no_room(str(self.device), slot, torch.cuda.mem_get_info(self.device)) from error
        copying.append((event, slot.arrays))
        return tensors, event

    def is_ready(self, ticket: Any) -> bool:
        """Whether the copy is done."""
        _, event = ticket
        return bool(event.query())

    def receive(self, ticket: Any) -> Sequence[torch.Tensor]:
        """Return the tensors, ready for what the calling thread's current stream does next."""
        tensors, event = ticket
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(event)
        for tensor in tensors:
            tensor.record_stream(stream)
        return list(tensors)

    def close(self) -> None:
        """Wait until every copy is done: only then may its slot be given back."""
        if self._stream is not None:
            self._stream.synchronize()
        self._copying.clear()


def make_torch_feed(device: str) -> DeviceFeed:
    """Return the feed of a device as PyTorch names it, "cpu", "cuda" or "cuda:0"; "": its default device.

    Raises:
        ConfigError: there is no such device here.
    """
    feed = f"torch:{device}" if device else "torch"
    try:
        wanted = torch.device(device) if device else torch.get_default_device()
    except RuntimeError:  # it is no device's name
        wanted = None
    if wanted is not None and wanted.type == "cpu" and not wanted.index:
        return TorchFeed()
    count = torch.cuda.device_count()
    if wanted is not None and wanted.type == "cuda" and (wanted.index or 0) < count:
        return TorchCudaFeed(wanted.index)
    there = ", ".join(repr(name) for name in ("torch:cpu", *(f"torch:cuda:{index}" for index in range(count))))
    raise ConfigError(f"feed {feed!r}: there is no such device, or no feed for it; wanted one of {there}")


def _dtype_by_name(index: int, dtype: np.dtype[Any]) -> torch.dtype | None:
    if dtype.kind == "V" and dtype.name in BY_NAME and hasattr(torch, dtype.name):
        found: torch.dtype = getattr(torch, dtype.name)
        return found
    try:
        torch.from_numpy(np.empty(0, dtype))
    except (TypeError, ValueError):  # the second: the byte order
        remedy = "numbers or bool; of byte strings array.view(np.uint8)"
        raise dtype_refused("PyTorch", index, dtype, remedy) from None
    return None


def _share(array: NDArray[Any], dtype: torch.dtype | None) -> torch.Tensor:
    if not array.flags.carray:  # contiguous, aligned to its dtype, and writeable
        array = np.array(array, order="C")
    if dtype is None:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(INTEGERS[array.itemsize][0])).view(dtype)
