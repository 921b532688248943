"""How a sample is drawn: schedules, transitions with log-probabilities, noise, rollout. Pure torch, no FastVideo."""
