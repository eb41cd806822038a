"""What a model is and does: speed, quality, memory, facts."""
