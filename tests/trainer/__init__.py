"""Tests of the trainer: they import FastVideo (half a minute, once for all of them)."""
