"""What a model needs, what a machine has, and what lies where."""
