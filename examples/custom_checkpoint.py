"""Make a checkpoint of your own, quantize it, and load what was written.

    python examples/custom_checkpoint.py

A checkpoint is a folder: config.json, safetensors shards whose tensors have Hugging Face's names, tokenizer.json and a
chat template. Here a GLM-4 of random weights is made from a config; for a real one, train it or take the weights from
where you have them: what counts are the names. Transformers opens the unquantized folder as well.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from glm4lite import Glm4Config, Glm4ForCausalLM, Tokenizer

TEXT = "The weights are read row by row."


def size(folder: Path) -> int:
    """Bytes of the shards."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@torch.no_grad()
def log_probs(model: Glm4ForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """[1, tokens, vocabulary]"""
    return model(ids).logits.float().log_softmax(-1)


def main() -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_pretrained("nano")
    config = Glm4Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.eos_token_id],
    )
    model = Glm4ForCausalLM(config)
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    wanted = log_probs(model, ids)

    with tempfile.TemporaryDirectory() as scratch:
        plain, small = Path(scratch) / "plain", Path(scratch) / "int4"
        model.save_pretrained(plain, max_shard_size="4MB")
        tokenizer.save_pretrained(plain)
        print(f"written: {len([*plain.glob('*.safetensors')])} shards, {size(plain):,} bytes")

        quantized = Glm4ForCausalLM.from_pretrained(plain, quant="int4", dtype="float32")
        quantized.save_pretrained(small)  # as `glm4lite quantize plain small` does
        tokenizer.save_pretrained(small)
        print(f"as int4: {size(small):,} bytes, {size(small) / size(plain):.0%}")

        again = Glm4ForCausalLM.from_pretrained(small)  # what is stored as int4 stays so
        divergence = torch.nn.functional.kl_div(log_probs(again, ids), wanted, log_target=True, reduction="batchmean")
        print(f"KL divergence from the unquantized model: {divergence.item() / ids.shape[1]:.5f} a token")
        same = torch.equal(log_probs(again, ids), log_probs(quantized, ids))
        print(f"loaded again it computes {'the same' if same else 'SOMETHING ELSE'}")


if __name__ == "__main__":
    main()
