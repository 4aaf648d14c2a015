"""A JAX loop. A `jax.sharding.Sharding` in place of "jax" gives each device its rows."""

import jax
import numpy as np

import input_workers as iw

pictures = iw.sources.Arrays(np.random.rand(2000, 64).astype("float32"), np.random.randint(0, 10, 2000).astype("int32"))
stream = iw.Stream(pictures, shuffle=True, epochs=2)
coordinator = iw.init_data_input_workers("jax", ["picture", "label"], stream, 50, num_workers=4)


@jax.jit
def step(weights, picture, label):
    def loss(weights):
        scores = jax.nn.log_softmax(picture @ weights)
        return -scores[jax.numpy.arange(len(label)), label].mean()

    value, gradient = jax.value_and_grad(loss)(weights)
    return value, weights - 0.1 * gradient


weights = jax.numpy.zeros((64, 10))
with coordinator:
    for picture, label in coordinator["train"]:
        value, weights = step(weights, picture, label)
    print(f"loss {value:.2f}; {coordinator['train'].stats().ledger}")
