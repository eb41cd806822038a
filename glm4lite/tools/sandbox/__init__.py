"""Running a model's Python code in a process with limits."""
