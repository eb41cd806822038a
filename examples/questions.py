"""The data of the two fine-tuning examples: questions of three kinds, and how many a classifier labels right."""

from __future__ import annotations

import random

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


def questions(count: int, seed: int) -> list[tuple[str, int]]:
    """Questions with the number of their label."""
    draw = random.Random(seed)
    labels = [draw.choice(list(LABELS)) for _ in range(count)]
    return [(draw.choice(TEMPLATES[label]).format(draw.randint(2, 99), draw.randint(2, 28)), label) for label in labels]


@torch.no_grad()
def labelled_right(model: Glm4ForSequenceClassification, tokenizer: Tokenizer) -> tuple[int, list[str]]:
    """How many of 200 new questions, and the labels the model gave."""
    unseen = questions(200, seed=1)
    model.eval()
    logits = model(**tokenizer([text for text, _ in unseen], padding=True, return_tensors="pt")).logits
    said = [model.config.id2label[int(number)] for number in logits.argmax(-1)]
    right = sum(label == LABELS[number] for label, (_, number) in zip(said, unseen, strict=True))
    print(f"{right} of {len(unseen)} new questions are labelled right")
    return right, said
