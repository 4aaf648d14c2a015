"""The conformance suite of the feeds, for PyTorch's tensors. Imports PyTorch."""

import ml_dtypes
import numpy as np
from feeds.feed_conformance import NUMBERS, FeedConformance, MayBeWrittenTo

from input_workers.feeds.torch_feed import make_torch_feed


class TorchConformance(FeedConformance, MayBeWrittenTo):
    dtypes = (*NUMBERS, ml_dtypes.float8_e4m3fn)

    def make_feed(self):
        return make_torch_feed(self.feed.partition(":")[2])

    def value(self, delivered):
        host = delivered.cpu()
        if hasattr(ml_dtypes, str(delivered.dtype)[6:]):  # NumPy itself has no such dtype
            return host.float().numpy().astype(self.dtype(delivered))
        return host.numpy()

    def dtype(self, delivered):
        name = str(delivered.dtype).removeprefix("torch.")
        return np.dtype(getattr(ml_dtypes, name, name))

    def address(self, delivered):
        return delivered.data_ptr()
