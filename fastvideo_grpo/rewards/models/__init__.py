"""Reward models: networks with published weights, a file each, and what they share."""
