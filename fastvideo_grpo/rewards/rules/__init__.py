"""Rewards of a few lines of code, a file each."""
