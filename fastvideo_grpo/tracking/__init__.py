"""What a run tells: metrics.jsonl, the console, Weights & Biases, pictures."""
