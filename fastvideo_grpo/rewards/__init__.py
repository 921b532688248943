"""Rewards: networks, rules of a few lines, where they run, and the set that a run scores with."""
