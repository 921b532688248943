"""What is optimised: advantages, selection of samples and timesteps, objectives. Pure torch, no FastVideo."""
