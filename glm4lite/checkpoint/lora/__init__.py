"""LoRA adapters: read from what PEFT and mlx-lm write, laid over a checkpoint's weights or beside them."""
