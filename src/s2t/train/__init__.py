"""Training of the selector adapter: groups to batches, losses on shared prefixes, checkpoints that resume exactly."""
