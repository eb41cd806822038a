"""Runs where llama-cpp-python is: run_llama.py FILE PROMPTS_JSON ANSWERS_NPZ (prompts as lists of ids)."""

import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

file, prompts, answers = sys.argv[1:]
llm = llama_cpp.Llama(file, n_ctx=512, logits_all=True, verbose=False)
vocabulary = llama_cpp.llama_model_get_vocab(llm._model.model)
ends = [token for token in range(llm.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocabulary, token)]
found: dict[str, Any] = {
    "ends": np.array(ends),
    "text": np.array(llm.tokenize("Hi 12345 你好".encode(), add_bos=True, special=True)),
}
for number, ids in enumerate(json.loads(Path(prompts).read_text())):
    llm.reset()
    llm.eval(ids)
    found[str(number)] = np.array(llm.scores[: len(ids)], dtype=np.float32)
np.savez(answers, **found)
