"""llama.cpp's own code through ctypes: its quantizers, and a Q4_0 matrix in its repacked layout with its product.

The library is the one llama-cpp-python brings (bench/llama.py says how to build it).
"""

from __future__ import annotations

import ctypes
import importlib.util
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

F32, Q4_0 = 0, 2  # ggml_type
KINDS = {
    "Q4_0": 2, "Q4_1": 3, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14,
    "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ4_NL": 20, "IQ3_S": 21, "IQ2_S": 22, "IQ4_XS": 23,
}  # fmt: skip
"""Names of ggml types that weights are stored in, and their numbers."""


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "ggml_init": ([_InitParams], c_void_p),
    "ggml_tensor_overhead": ([], c_size_t),
    "ggml_graph_overhead": ([], c_size_t),
    "ggml_new_tensor_2d": ([c_void_p, c_int, c_int64, c_int64], c_void_p),
    "ggml_mul_mat": ([c_void_p, c_void_p, c_void_p], c_void_p),
    "ggml_new_graph": ([c_void_p], c_void_p),
    "ggml_build_forward_expand": ([c_void_p, c_void_p], None),
    "ggml_nbytes": ([c_void_p], c_size_t),
    "ggml_quantize_chunk": ([c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, POINTER(c_float)], c_size_t),
    "ggml_blck_size": ([c_int], c_int64),
    "ggml_type_size": ([c_int], c_size_t),
    "ggml_backend_cpu_init": ([], c_void_p),
    "ggml_backend_cpu_set_n_threads": ([c_void_p, c_int], None),
    "ggml_backend_get_device": ([c_void_p], c_void_p),
    "ggml_backend_dev_backend_reg": ([c_void_p], c_void_p),
    "ggml_backend_reg_get_proc_address": ([c_void_p, c_char_p], c_void_p),
    "ggml_backend_alloc_ctx_tensors_from_buft": ([c_void_p, c_void_p], c_void_p),
    "ggml_backend_alloc_ctx_tensors": ([c_void_p, c_void_p], c_void_p),
    "ggml_backend_tensor_set": ([c_void_p, c_void_p, c_size_t, c_size_t], None),
    "ggml_backend_tensor_get": ([c_void_p, c_void_p, c_size_t, c_size_t], None),
    "ggml_backend_graph_compute": ([c_void_p, c_void_p], c_int),
}


_DEQUANTIZE: tuple[list[Any], Any] = ([c_void_p, c_void_p, c_int64], None)


def absent() -> str:
    """Why there is no llama.cpp to measure, "" where there is."""
    return "" if importlib.util.find_spec("llama_cpp") else "llama.cpp is not installed: pip install llama-cpp-python"


class _Library:
    """The functions of SIGNATURES, from whichever of ggml's libraries has them."""

    def __init__(self, libraries: list[ctypes.CDLL]) -> None:
        self._libraries = libraries

    def __getattr__(self, name: str) -> Any:
        function = self.function(name, SIGNATURES[name])
        setattr(self, name, function)
        return function

    def function(self, name: str, signature: tuple[list[Any], Any]) -> Any:
        """A function that SIGNATURES does not list."""
        function = next(getattr(library, name) for library in self._libraries if hasattr(library, name))
        function.argtypes, function.restype = signature
        return function


@lru_cache(maxsize=1)
def _library() -> _Library:
    import llama_cpp  # loads the libraries, so that each finds the others

    folder = Path(llama_cpp.__file__).parent / "lib"
    return _Library([ctypes.CDLL(str(path)) for path in sorted(folder.glob("libggml*"))])


def bits(kind: str) -> float:
    """Bits a weight in a type of KINDS, scales included."""
    ggml = _library()
    return float(8 * ggml.ggml_type_size(KINDS[kind]) / ggml.ggml_blck_size(KINDS[kind]))


def requantized(weight: Tensor, kind: str, importance: Tensor | None) -> Tensor:
    """float32 [N, K] as a type of KINDS holds it; importance [K] is the mean square of each input column.

    Where K is no multiple of the type's blocks, zeros that nothing depends on are quantized after each row.
    """
    ggml, (rows, columns) = _library(), weight.shape
    block = int(ggml.ggml_blck_size(KINDS[kind]))
    missing = -columns % block
    floats = torch.nn.functional.pad(weight.float(), (0, missing)).contiguous()
    size = rows * (columns + missing) // block * int(ggml.ggml_type_size(KINDS[kind]))
    codes, back, counts = torch.empty(size, dtype=torch.uint8), torch.empty_like(floats), None
    if importance is not None:
        padded = torch.nn.functional.pad(importance.float(), (0, missing), value=float(importance.mean()) * 1e-6)
        counts = ctypes.cast(padded.contiguous().data_ptr(), POINTER(c_float))
    written = ggml.ggml_quantize_chunk(
        KINDS[kind], floats.data_ptr(), codes.data_ptr(), 0, rows, columns + missing, counts
    )
    assert written == size, f"{kind}: {written} bytes for {size}"
    dequantize = ggml.function("dequantize_row_" + kind.lower().replace("_k", "_K"), _DEQUANTIZE)
    dequantize(codes.data_ptr(), back.data_ptr(), floats.numel())
    return back[:, :columns]


class GgmlLinear:
    """x [M, K] -> x * weight^T [M, N], float32, by ggml's CPU backend; the weight is repacked as llama.cpp does it."""

    def __init__(self, weight: Tensor, threads: int) -> None:
        self._ggml = ggml = _library()
        self._rows, self._columns = weight.shape
        self._backend = ggml.ggml_backend_cpu_init()
        ggml.ggml_backend_cpu_set_n_threads(self._backend, threads)
        self._context = self._new_context(1)
        self._weight = ggml.ggml_new_tensor_2d(self._context, Q4_0, self._columns, self._rows)
        if not ggml.ggml_backend_alloc_ctx_tensors_from_buft(self._context, self._repacking()):
            raise MemoryError(f"ggml has no memory for a weight of {self._rows} x {self._columns}")
        self.nbytes = ggml.ggml_nbytes(self._weight)
        codes, floats = torch.empty(self.nbytes, dtype=torch.uint8), weight.float().contiguous()
        ggml.ggml_quantize_chunk(Q4_0, floats.data_ptr(), codes.data_ptr(), 0, self._rows, self._columns, None)
        ggml.ggml_backend_tensor_set(self._weight, codes.data_ptr(), 0, self.nbytes)
        self._graphs: dict[int, tuple[int, int, int]] = {}

    def _new_context(self, tensors: int) -> int:
        size = tensors * self._ggml.ggml_tensor_overhead() + self._ggml.ggml_graph_overhead()
        context: int = self._ggml.ggml_init(_InitParams(size, None, True))
        return context

    def _repacking(self) -> int:
        """The CPU's buffer type that repacks what is written to it: the only one beside the plain one, without AMX."""
        device = self._ggml.ggml_backend_get_device(self._backend)
        registry = self._ggml.ggml_backend_dev_backend_reg(device)
        address = self._ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        types = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)
        found: int = types[0]
        return found

    def _graph(self, tokens: int) -> tuple[int, int, int]:
        """x, y and the graph between them, made once for each number of tokens."""
        if tokens not in self._graphs:
            ggml, context = self._ggml, self._new_context(4)
            x = ggml.ggml_new_tensor_2d(context, F32, self._columns, tokens)
            y = ggml.ggml_mul_mat(context, self._weight, x)
            graph = ggml.ggml_new_graph(context)
            ggml.ggml_build_forward_expand(graph, y)
            if not ggml.ggml_backend_alloc_ctx_tensors(context, self._backend):
                raise MemoryError(f"ggml has no memory for {tokens} tokens")
            self._graphs[tokens] = (x, y, graph)
        return self._graphs[tokens]

    def __call__(self, x: Tensor) -> Tensor:
        given, result, graph = self._graph(x.shape[0])
        self._ggml.ggml_backend_tensor_set(given, x.data_ptr(), 0, x.nbytes)
        if self._ggml.ggml_backend_graph_compute(self._backend, graph) != 0:
            raise RuntimeError("ggml could not compute")
        out = torch.empty(x.shape[0], self._rows)
        self._ggml.ggml_backend_tensor_get(result, out.data_ptr(), 0, out.nbytes)
        return out
