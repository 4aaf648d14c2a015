"""A PyTorch loop: tensors that are on the device before the step asks for them."""

import numpy as np
import torch

import input_workers as iw

device = "cuda:0" if torch.cuda.is_available() else "cpu"
pictures = iw.sources.Arrays(np.random.rand(2000, 64).astype("float32"), np.random.randint(0, 10, 2000))
stream = iw.Stream(pictures, shuffle=True, epochs=2)
coordinator = iw.init_data_input_workers(f"torch:{device}", ["picture", "label"], stream, 50, num_workers=4)

model = torch.nn.Linear(64, 10).to(device)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
with coordinator:
    for picture, label in coordinator["train"]:
        loss = torch.nn.functional.cross_entropy(model(picture), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss {loss.item():.2f}; {coordinator['train'].stats().ledger}")
