"""Where a reward runs: in the training process, in a process of its own, or behind a server."""
