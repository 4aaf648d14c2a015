"""A TensorFlow loop: eager tensors that share the memory they were assembled in."""

import numpy as np
import tensorflow as tf

import input_workers as iw

pictures = iw.sources.Arrays(np.random.rand(2000, 64).astype("float32"), np.random.randint(0, 10, 2000))
stream = iw.Stream(pictures, shuffle=True, epochs=2)
coordinator = iw.init_data_input_workers("tensorflow", ["picture", "label"], stream, 50, num_workers=4)
weights = tf.Variable(tf.zeros((64, 10)))


@tf.function
def step(picture, label):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(label, picture @ weights))
    weights.assign_sub(0.1 * tape.gradient(loss, weights))
    return loss


with coordinator:
    for picture, label in coordinator["train"]:
        loss = step(picture, label)
    print(f"loss {loss:.2f}; {coordinator['train'].stats().ledger}")
