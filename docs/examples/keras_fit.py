"""Keras' fit over a source. The same with each of its backends: KERAS_BACKEND=jax python keras_fit.py"""

import keras
import numpy as np

import input_workers as iw

pictures = iw.sources.Arrays(np.random.rand(2000, 64).astype("float32"), np.random.randint(0, 10, 2000))
stream = iw.Stream(pictures, shuffle=True, epochs=None)
coordinator = iw.init_data_input_workers("numpy", ["picture", "label"], stream, 50, num_workers=4)
coordinator.start()

model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
history = model.fit(coordinator["train"].epochs(steps_per_epoch=40), epochs=2, verbose=0)
print(f"{len(history.history['loss'])} epochs; {coordinator['train'].stats().ledger}")
coordinator.stop()
