"""Files of published models: which of a folder are read, and what they hold, for every reader alike."""
