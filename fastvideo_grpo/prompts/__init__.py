"""Prompts: files, their order, the tokens encoders see of them, and the cache of their embeddings."""
