"""Trainers: base.py is Algorithm 1, one file per model says what is particular to it. Only cli.py imports this package."""
