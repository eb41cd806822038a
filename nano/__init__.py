"""How the embedded checkpoint `nano` was made: dialogues, tokenizer, training, evaluation. See README.md."""
