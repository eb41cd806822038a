"""Text to ids and back: tokenizer, chat template, and what the model's text says."""
