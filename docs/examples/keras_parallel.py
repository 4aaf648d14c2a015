"""An existing Keras data set, its batches made in worker processes."""

import keras
import numpy as np

from input_workers.adapters.keras import parallel


class Rolled(keras.utils.PyDataset):
    """Pictures that are rolled row by row: Python's own work, for which threads would wait for each other."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        pictures = np.random.rand(16, 28, 28).astype("float32")
        for picture in pictures:
            for row in range(28):
                picture[row] = np.roll(picture[row], row)
        return pictures, np.random.randint(0, 10, 16)


model = keras.Sequential([keras.Input((28, 28)), keras.layers.Flatten(), keras.layers.Dense(10)])
model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
history = model.fit(parallel(Rolled(), workers=2), epochs=2, verbose=0)
print(f"{len(history.history['loss'])} epochs of 20 batches")
