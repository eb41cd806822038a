"""What `glm4lite.tokenizer.Tokenizer` is made of."""
