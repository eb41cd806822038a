"""Fine-tune a GLM-4 model into a classifier of questions, save it, load it again and get the same answers.

    python examples/finetune_classifier.py

All weights are trained, in float32, with torch's own loop: the embedded `nano` takes seconds on a CPU. For a large
model give --model and freeze the trunk with --head-only, for gradients of 9 billion weights take 72 GB beside them.
finetune_with_trainer.py does the same with Transformers' Trainer.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from questions import LABELS, labelled_right, questions

from glm4lite import Glm4ForSequenceClassification, Tokenizer


def train(model: Glm4ForSequenceClassification, tokenizer: Tokenizer, steps: int, rate: float) -> list[float]:
    """The loss of each step."""
    data = questions(16 * steps, seed=0)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    losses = []
    model.train()
    for step in range(steps):
        batch = data[16 * step : 16 * (step + 1)]
        inputs = tokenizer([text for text, _ in batch], padding=True, return_tensors="pt")
        loss = model(**inputs, labels=torch.tensor([label for _, label in batch])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        print(f"step {step + 1:3d}  loss {losses[-1]:.4f}")
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tunes a GLM-4 model into a classifier of questions.")
    parser.add_argument("--model", default="nano", help="a folder or a Hub repo (default: the embedded nano)")
    parser.add_argument("--out", type=Path, help="where the classifier is saved (default: a temporary folder)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--head-only", action="store_true", help="train the new head, leave the trunk as it is")
    options = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = Tokenizer.from_pretrained(options.model)
    model = Glm4ForSequenceClassification.from_pretrained(
        options.model, id2label=LABELS, pad_token_id=tokenizer.pad_token_id, torch_dtype=torch.float32
    )
    if options.head_only:
        model.base_model.requires_grad_(False)
    losses = train(model, tokenizer, options.steps, options.learning_rate)
    print(f"loss: {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    right, said = labelled_right(model, tokenizer)

    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch) / "classifier"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        again = Glm4ForSequenceClassification.from_pretrained(folder)
        same = labelled_right(again, Tokenizer.from_pretrained(folder)) == (right, said)
        print(f"saved to {folder}; loaded again it gives {'the same' if same else 'OTHER'} answers")


if __name__ == "__main__":
    main()
