"""Answer several prompts in one batch: each read of the weights serves all of them.

    python examples/batch.py                                        # the embedded `nano`
    python examples/batch.py zai-org/GLM-4-9B-0414

The names are those Transformers documents: a chat template applied to a list of conversations, padding on the left, a
mask, `generate`. Where decoding waits for memory, as it does with a large model, a batch takes hardly longer than its
longest answer alone.
"""

from __future__ import annotations

import sys
import time

from glm4lite import Glm4ForCausalLM, Tokenizer

QUESTIONS = ("Hello!", "Who are you?", "What can you do?", "Thank you very much, that helped.")


def answers(model: Glm4ForCausalLM, tokenizer: Tokenizer, questions: tuple[str, ...]) -> list[str]:
    """Greedy answers, in the order of the questions."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=60)
    begin = inputs["input_ids"].shape[1]  # padding is on the left, so all answers begin at one place
    return [text.strip() for text in tokenizer.batch_decode(output[:, begin:], skip_special_tokens=True)]


def main(source: str = "nano") -> None:
    tokenizer = Tokenizer.from_pretrained(source, padding_side="left")
    model = Glm4ForCausalLM.from_pretrained(source, quant="int8")

    answers(model, tokenizer, QUESTIONS[:1])  # what is made at the first call is no part of the times
    began = time.perf_counter()
    together = answers(model, tokenizer, QUESTIONS)
    middle = time.perf_counter()
    alone = [answers(model, tokenizer, (question,))[0] for question in QUESTIONS]
    ended = time.perf_counter()

    for question, answer in zip(QUESTIONS, together, strict=True):
        print(f"{question:36}{answer}")
    print(f"together {middle - began:.2f} s, in turn {ended - middle:.2f} s")
    print(f"in turn they are {'the same' if alone == together else 'OTHERS'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
