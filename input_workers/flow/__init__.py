"""The path of the rows: chunk queue, re-chunker, slots, enqueuer, device queue."""
