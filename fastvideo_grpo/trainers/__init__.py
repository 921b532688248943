"""Trainers: base.py is Algorithm 1, training_run.py what is made before it, policy.py what it asks of a model, and one file per
model says what is particular to it."""
