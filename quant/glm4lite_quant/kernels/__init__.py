"""The ways to multiply with a quantized weight, each in a file of its own; `picking` chooses one for a weight."""
