"""Growth: a trained checkpoint becomes a larger model's start."""
