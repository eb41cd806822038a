"""Fine-tune a GLM-4 model with Transformers' Trainer, which takes glm4lite's classes and tokenizer as they are.

    pip install transformers accelerate
    python examples/finetune_with_trainer.py

The task is that of finetune_classifier.py, which does it with torch's own loop.
"""

from __future__ import annotations

import sys
import tempfile

import torch
from questions import LABELS, labelled_right, questions
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from glm4lite import Glm4ForSequenceClassification, Tokenizer


def main(model_name: str = "nano", steps: str = "30") -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_pretrained(model_name)
    model = Glm4ForSequenceClassification.from_pretrained(
        model_name, id2label=LABELS, pad_token_id=tokenizer.pad_token_id, torch_dtype=torch.float32
    )
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch,
            max_steps=int(steps),
            per_device_train_batch_size=16,
            learning_rate=3e-4,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=model.device.type == "cpu",
        )
        data = [{**tokenizer(text), "labels": label} for text, label in questions(16 * int(steps), seed=0)]
        trainer = Trainer(model, arguments, train_dataset=data, data_collator=DataCollatorWithPadding(tokenizer))
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    labelled_right(model, tokenizer)


if __name__ == "__main__":
    main(*sys.argv[1:])
