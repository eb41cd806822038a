"""llama.cpp on the same weights: a checkpoint as GGUF, quantized with llama.cpp's own quantizer, and its speed.

Needs `pip install llama-cpp-python gguf`; to build it for this machine: CMAKE_ARGS="-DGGML_NATIVE=ON" pip install
--no-binary llama-cpp-python llama-cpp-python. The GGUF has no vocabulary: ids go in, logits come out.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.load_plan import read_config
from glm4lite.model.config import Glm4Config

FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15}  # llama_ftype
ERROR = 4  # ggml_log_level


def write_gguf(source: Path, destination: Path) -> None:
    """A bfloat16 glm4 checkpoint as one GGUF of the same type, tensor by tensor from the mapped shards."""
    import gguf

    checkpoint = Checkpoint.open(source)
    config = read_config(checkpoint)
    if config.model_type != "glm4":
        raise ValueError(f"{source} is a {config.model_type!r} model; only 'glm4' is converted")
    writer = gguf.GGUFWriter(destination, "glm4")
    _write_keys(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GLM4, config.num_hidden_layers)
    for name in checkpoint.names():
        stem, _, suffix = name.rpartition(".")
        values = _stored(checkpoint, name)
        kind = gguf.GGMLQuantizationType.F32 if values.dtype == np.float32 else gguf.GGMLQuantizationType.BF16
        ours = f"{names.get_name(stem)}.{suffix}"
        writer.add_tensor_info(ours, values.shape, values.dtype, values.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in checkpoint.names():
        writer.write_tensor_data(_stored(checkpoint, name))
    writer.close()


def _write_keys(writer: Any, config: Glm4Config) -> None:
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(32)  # mostly bfloat16


def _stored(checkpoint: Checkpoint, name: str) -> np.ndarray[Any, Any]:
    """Matrices as they lie in the file (bfloat16 as 16-bit words), the rest as float32, which llama.cpp asks for."""
    tensor = checkpoint.mapped(name)
    return (tensor.float() if tensor.dim() == 1 else tensor.view(torch.int16)).numpy()


def quantize(source: Path, destination: Path, kind: str, threads: int) -> None:
    """llama.cpp's own quantizer with its defaults for `kind`: Q4_0, Q4_K_M or Q8_0."""
    import llama_cpp

    _quiet()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[kind], threads
    code = llama_cpp.llama_model_quantize(bytes(source), bytes(destination), ctypes.byref(params))
    if code != 0:
        raise RuntimeError(f"llama.cpp could not quantize {source} to {kind} (code {code})")


class Llama:
    """A GGUF loaded by llama.cpp with its defaults. `begin` gives it a context, in which sequences are numbered."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        _quiet()
        self._api, self._path, self._threads, self._context = llama_cpp, path, threads, None
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(bytes(path), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def begin(self, tokens: int, sequences: int = 1) -> None:
        """A new context, of so many positions for each of so many sequences, instead of the last one."""
        if self._context:
            self._api.llama_free(self._context)
        params = self._api.llama_context_default_params()
        params.n_seq_max, params.n_ctx = sequences, sequences * max(256, -(-tokens // 256) * 256)
        params.n_batch, params.n_ubatch = 512, 512
        params.n_threads = params.n_threads_batch = self._threads
        self._context = self._api.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {sequences} x {tokens} tokens for {self._path}")

    def forget(self) -> None:
        """Empties the context."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def forward(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """Adds ids to the first sequence; float32 [vocab_size] logits of the last one (valid until the next call)."""
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        self._compute(self._api.llama_batch_get_one(tokens, len(ids)), len(ids))
        return self._logits(-1)

    def step(self, spans: list[tuple[int, list[int], int]]) -> list[np.ndarray[Any, Any]]:
        """Adds the ids of several sequences in one pass: (sequence, ids, place of the first). Logits as `forward`'s.

        At most 512 ids in all.
        """
        count = sum(len(ids) for _, ids, _ in spans)
        batch = self._api.llama_batch_init(count, 0, 1)
        try:
            last = list[int]()
            for sequence, ids, start in spans:
                for place, token in enumerate(ids, start):
                    row = batch.n_tokens
                    batch.token[row], batch.pos[row], batch.logits[row] = token, place, place == start + len(ids) - 1
                    batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
                    batch.n_tokens += 1
                last.append(batch.n_tokens - 1)
            self._compute(batch, count)
        finally:
            self._api.llama_batch_free(batch)
        return [self._logits(row) for row in last]

    def _compute(self, batch: Any, count: int) -> None:
        code = self._api.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama.cpp failed to compute {count} tokens (code {code})")

    def _logits(self, row: int) -> np.ndarray[Any, Any]:
        logits = self._api.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(logits, (self._vocab_size,))


def measure(path: Path, threads: int, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """Loads, warms up, and times the prompt and `new_tokens` greedy tokens after it."""
    started = time.perf_counter()
    model = Llama(path, threads)
    model.begin(len(prompt) + new_tokens)
    loaded = time.perf_counter()
    for ids in (prompt, prompt[:1]):  # what the first use of each path costs is not counted
        model.forward(ids)
    model.forget()
    started_prefill = time.perf_counter()
    logits = model.forward(prompt)
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        logits = model.forward([int(logits.argmax())])
    ended = time.perf_counter()
    return {
        "load_s": loaded - started,
        "prefill_tokens_per_s": len(prompt) / (prefilled - started_prefill),
        "decode_tokens_per_s": new_tokens / (ended - prefilled),
    }


def _errors_only(level: int, text: bytes, _: object) -> None:
    if level == ERROR:
        sys.stderr.write(text.decode("utf-8", "replace"))


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_errors_only)


def _quiet() -> None:
    import llama_cpp

    llama_cpp.llama_log_set(_LOG, None)
