"""Continue a text with `generate`, by the names Transformers documents, and see it while it is written.

    python examples/streaming.py                                    # the embedded `nano`
    python examples/streaming.py zai-org/GLM-4-9B-0414 "Once upon a time"

Any object with `put` and `end` is a streamer; Transformers' own TextStreamer works as it is. The one below also notes
when each token came.
"""

from __future__ import annotations

import sys
import time

import torch

from glm4lite import Glm4ForCausalLM, Tokenizer


class Shown:
    """Prints an answer as it grows, and notes when its tokens came."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.ids, self.shown, self.times = tokenizer, list[int](), "", list[float]()

    def put(self, ids: torch.Tensor) -> None:
        """Called with the prompt [1, tokens] first, then with each new id [1]."""
        self.times.append(time.perf_counter())
        if ids.dim() == 2:
            return
        self.ids += ids.tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # the first bytes of a letter whose others are still to come
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text

    def end(self) -> None:
        print()


def main(source: str = "nano", question: str = "Who are you?") -> None:
    tokenizer = Tokenizer.from_pretrained(source)
    model = Glm4ForCausalLM.from_pretrained(source, quant="int4")
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    streamer = Shown(tokenizer)
    torch.manual_seed(7)  # the same seed draws the same ids
    output = model.generate(
        **inputs.to(model.device),
        max_new_tokens=80,
        do_sample=True,
        temperature=0.5,
        top_p=0.9,
        repetition_penalty=1.05,
        streamer=streamer,
    )
    new = output[0, inputs["input_ids"].shape[1] :].tolist()
    print(f"{len(new)} tokens, the first after {streamer.times[1] - streamer.times[0]:.2f} s")
    print(f"streamed and returned ids are {'the same' if new == streamer.ids else 'OTHERS'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
