"""Fine-tune a GLM-4 model into a classifier of questions, save it, load it again and get the same answers.

    python examples/finetune_classifier.py                    # torch's own loop
    python examples/finetune_classifier.py --trainer          # Transformers' Trainer, where it is installed

All weights are trained, in float32: the embedded `nano` takes seconds on a CPU. For a large model give --model and
freeze the trunk with --head-only, for gradients of 9 billion weights take 72 GB beside them.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import torch

from glm4lite import Glm4ForSequenceClassification, Tokenizer

LABELS = {0: "arithmetic", 1: "calendar", 2: "writing"}
TEMPLATES = {
    0: ("What is {} * {}?", "Add {} and {}.", "How much is {} minus {}?", "Divide {} by {}."),
    1: (
        "Which day is {} days after May {}?",
        "How many days are {} weeks and {} days?",
        "What time is it {}:{} later?",
    ),
    2: ("Write {} lines about {} birds.", "Tell a story of {} towns and {} rivers.", "Make {} rhymes with {} words."),
}


def examples(count: int, seed: int) -> list[tuple[str, int]]:
    """Questions with the number of their label."""
    draw = random.Random(seed)
    labels = [draw.choice(list(LABELS)) for _ in range(count)]
    return [(draw.choice(TEMPLATES[label]).format(draw.randint(2, 99), draw.randint(2, 28)), label) for label in labels]


def train(model: Glm4ForSequenceClassification, tokenizer: Tokenizer, steps: int, rate: float) -> list[float]:
    """Torch's own loop; the loss of each step."""
    data = examples(16 * steps, seed=0)
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


def train_with_trainer(
    model: Glm4ForSequenceClassification, tokenizer: Tokenizer, steps: int, rate: float, folder: Path
) -> list[float]:
    """The same with Transformers' Trainer, which takes both as they are; the loss of each step."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    data = [{**tokenizer(text), "labels": label} for text, label in examples(16 * steps, seed=0)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=rate,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=model.device.type == "cpu",
    )
    collator = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collator)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def answers(model: Glm4ForSequenceClassification, tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    """The label of each text."""
    model.eval()
    logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    return [model.config.id2label[int(number)] for number in logits.argmax(-1)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tunes a GLM-4 model into a classifier of questions.")
    parser.add_argument("--model", default="nano", help="a folder or a Hub repo (default: the embedded nano)")
    parser.add_argument("--out", type=Path, help="where the classifier is saved (default: a temporary folder)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--head-only", action="store_true", help="train the new head, leave the trunk as it is")
    parser.add_argument("--trainer", action="store_true", help="use Transformers' Trainer")
    options = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = Tokenizer.from_pretrained(options.model)
    model = Glm4ForSequenceClassification.from_pretrained(
        options.model, id2label=LABELS, pad_token_id=tokenizer.pad_token_id, torch_dtype=torch.float32
    )
    if options.head_only:
        model.base_model.requires_grad_(False)

    with tempfile.TemporaryDirectory() as scratch:
        if options.trainer:
            losses = train_with_trainer(model, tokenizer, options.steps, options.learning_rate, Path(scratch))
        else:
            losses = train(model, tokenizer, options.steps, options.learning_rate)
        print(f"loss: {losses[0]:.4f} at first, {losses[-1]:.4f} at last")

        unseen = examples(200, seed=1)
        texts = [text for text, _ in unseen]
        said = answers(model, tokenizer, texts)
        right = sum(label == LABELS[number] for label, (_, number) in zip(said, unseen, strict=True))
        print(f"{right} of {len(unseen)} new questions are labelled right")

        folder = options.out or Path(scratch) / "classifier"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        again = Glm4ForSequenceClassification.from_pretrained(folder)
        same = answers(again, Tokenizer.from_pretrained(folder), texts) == said
        print(f"saved to {folder}; loaded again it gives {'the same' if same else 'OTHER'} answers")
        if not same or losses[-1] >= losses[0]:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
