"""Scoring a policy on fixed prompts and fixed noise."""
