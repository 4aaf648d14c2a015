"""One of several processes that train together: it brings its own rows, and sees a batch with those of all.

Arguments: its number, how many there are, the address where they meet.
"""

import sys

import jax
import numpy as np

import input_workers as iw

ROWS, BATCHES = 4, 5


def main(number: int, count: int, address: str) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(address, count, number)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("rows",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    mine = np.arange(ROWS * BATCHES) * count + number
    coordinator = iw.GlobalCoordinator()
    stream = iw.Stream(iw.sources.Arrays(mine), rows_per_request=3)
    iw.init_data_input_workers(sharding, ["data"], stream, ROWS, 1, ordered=True, coordinator=coordinator)
    total = jax.jit(lambda x: x.sum(), out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    sums = []
    with coordinator:
        for index, (data,) in enumerate(coordinator["train"]):
            assert data.shape == (ROWS * count,), data.shape
            rows = np.concatenate([np.asarray(shard.data) for shard in data.addressable_shards])
            assert rows.tolist() == mine[index * ROWS : (index + 1) * ROWS].tolist(), rows
            sums.append(int(total(data)))
    everything = np.arange(ROWS * BATCHES * count).reshape(BATCHES, -1)
    assert sums == everything.sum(1).tolist(), sums
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
