"""Checkpoints that appear when complete, are verified when read, and survive a full disk (`store`)."""
