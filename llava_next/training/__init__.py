"""The run: configuration, parallelism, optimizer, loop, checkpoints and metrics."""
