"""Pictures and clips as rewards look at them."""
