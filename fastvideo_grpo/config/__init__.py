"""The configuration of a run: its keys, how files and words become it, what it cannot be, and how a run keeps it."""
