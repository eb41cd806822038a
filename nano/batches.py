"""Endless training batches, made by one background process: rows of like length, padded on the right.

Padding is on the right and attention is causal, so no mask is needed: what lies after a row's end is never looked at.
"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.queues import Queue

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nano import dialogues
from nano.render import IGNORED, Encoded, encode
from nano.tokenizer import token_id, word_pieces

CHUNK = 2048  # dialogues sorted by length together
ROUND = 16  # row lengths are rounded up to this


# Ids and labels as bytes and their shape: tensors would travel through shared memory, which containers limit.
Packed = tuple[bytes, bytes, tuple[int, int]]


@dataclass(frozen=True)
class Batch:
    """ids and labels [rows, length]; the labels are already shifted."""

    ids: Tensor
    labels: Tensor


def pad(rows: list[Encoded], filler: int) -> Batch:
    """Rows of different lengths as one batch."""
    length = -(-max(len(row.ids) for row in rows) // ROUND) * ROUND
    ids = torch.full((len(rows), length), filler)
    labels = torch.full((len(rows), length), IGNORED)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        labels[number, : len(row.ids)] = torch.tensor(row.labels)
    return Batch(ids, labels)


def group(rows: list[Encoded], tokens: int, filler: int, rng: random.Random) -> list[Batch]:
    """Sorts rows by length and cuts them into batches of at most `tokens` tokens, in random order."""
    batches: list[Batch] = []
    current: list[Encoded] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if current and (len(current) + 1) * (len(row.ids) + ROUND) > tokens:
            batches.append(pad(current, filler))
            current = []
        current.append(row)
    batches.append(pad(current, filler))
    rng.shuffle(batches)
    return batches


def chunk(tokenizer: Tokenizer, seed: int, number: int, echo_share: float, tokens: int) -> list[Batch]:
    """Chunk `number` of the endless training text; the same arguments give the same batches."""
    rng = random.Random(f"nano {seed} {number}")
    pieces, rows = word_pieces(tokenizer), []
    for _ in range(CHUNK):
        copying = rng.random() < echo_share
        dialogue = dialogues.echo(rng, pieces) if copying else dialogues.generate(rng, pieces=pieces)
        row = encode(tokenizer, dialogue, rng)
        if len(row.ids) <= tokens // 4:
            rows.append(row)
    return group(rows, tokens, token_id(tokenizer, "<|endoftext|>"), rng)


def echo_share(number: int) -> float:
    """Plain copying first: two chunks of it, then less and less."""
    return 0.6 if number < 2 else max(0.12, 0.3 - 0.03 * number)


def _produce(queue: Queue[list[Packed]], text: str, seed: int, first: int, stride: int, tokens: int) -> None:
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_str(text)
    number = first
    while True:
        made = chunk(tokenizer, seed, number, echo_share(number), tokens)
        queue.put([_packed(batch) for batch in made])
        number += stride


def _packed(batch: Batch) -> Packed:
    rows, length = batch.ids.shape
    return _pack(batch.ids), _pack(batch.labels), (rows, length)


def _pack(tensor: Tensor) -> bytes:
    return bytes(tensor.to(torch.int16).numpy().tobytes())


def _unpack(data: bytes, shape: tuple[int, int]) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.int16).view(shape).long()


def stream(tokenizer: Tokenizer, seed: int, first_chunk: int, stride: int, tokens: int) -> Iterator[tuple[int, Batch]]:
    """(chunk number, batch) without end, from a background process; takes every `stride`th chunk."""
    context = multiprocessing.get_context("spawn")
    queue: Queue[list[Packed]] = context.Queue(maxsize=2)
    worker = context.Process(
        target=_produce, args=(queue, tokenizer.to_str(), seed, first_chunk, stride, tokens), daemon=True
    )
    worker.start()
    number = first_chunk
    try:
        while True:
            for ids, labels, shape in queue.get():
                yield number, Batch(_unpack(ids, shape), _unpack(labels, shape))
            number += stride
    finally:
        worker.terminate()
