"""Prompts: files, the order in which they are drawn, and the cache of their text embeddings."""
