"""What `input-workers train` runs: a training job on the package's public API."""
