"""What a run will do and take, and what speaks against it, before anything is loaded."""
