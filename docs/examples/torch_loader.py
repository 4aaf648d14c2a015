"""A PyTorch data set, read by two threads in place of DataLoader's processes, and resumed in the middle of an epoch."""

import torch
from torch.utils.data import TensorDataset

import input_workers as iw

images, labels = torch.rand(640, 3, 32, 32), torch.randint(10, (640,))
dataset = TensorDataset(images, labels)


def make_loader():
    generator = torch.Generator().manual_seed(1)
    return iw.adapters.torch.loader(dataset, batch_size=64, shuffle=True, num_workers=2, generator=generator)


loader = make_loader()
for step, _batch in enumerate(loader, 1):
    if step == 4:
        state = loader.state_dict()
        break
resumed = make_loader()
resumed.load_state_dict(state)
rest = [label for _, label in resumed]
print(f"{step} batches of {len(rest[0])}, and {len(rest)} more after a resume")
