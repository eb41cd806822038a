"""What `glm4lite.text.tokenizer.Tokenizer` is made of."""
