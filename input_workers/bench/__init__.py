"""Benchmarks that anyone can run: each prints a ratio to a limit or a peer measured in the same run."""
