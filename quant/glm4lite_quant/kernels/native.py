"""The native CPU kernels (csrc/) through ctypes: finding the library, choosing an ISA, passing pointers.

GLM4LITE_KERNELS is the library's path, GLM4LITE_ISA forces one of ISAS, GLM4LITE_THREADS bounds the threads where
`set_threads` did not (else a core each, and torch's own setting). ctypes releases the GIL during every call.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import glm4lite_quant.host as host  # not from the package, whose own imports lead here
from glm4lite_quant.config import QuantError
from glm4lite_quant.format import Planes, not_finite
from glm4lite_quant.inputs import Inputs
from glm4lite_quant.kernels.reference import SHARES

ABI = 7
ISAS = ("scalar", "avx2", "avxvnni", "avx512vnni", "neon", "neoni8mm")  # in the order of the C enum, slowest first
SUFFIXES = {"win32": "dll", "darwin": "dylib"}  # of a library, by sys.platform; elsewhere so
FLOAT32, BFLOAT16, INT8, FLOAT16 = 0, 1, 2, 3  # element types, as in the C enum
DTYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
SCALES = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
OK, NOT_FINITE, NO_MEMORY = 0, 1, 2

_threads: int | None = None
"""What `set_threads` was given: for the library's pool, of which there is one in a process, as torch has one."""


class Weight(ctypes.Structure):
    """glm4_weight of csrc/qgemm.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qweight", "scales", "mins", "row_scale", "row_min")),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("group", ctypes.c_int32),
    ]


class _Matrix(ctypes.Structure):
    """glm4_matrix of csrc/qgemm.h: rows of bfloat16 or float32, `stride` elements apart."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    ]


class _Inputs(ctypes.Structure):
    """glm4_inputs of csrc/qgemm.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("importance", "within", "onto", "into")),
        ("block", ctypes.c_int32),
        ("rank", ctypes.c_int32),
    ]


class _Grid(ctypes.Structure):
    """glm4_grid of csrc/qgemm.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero")),
        ("k", ctypes.c_int64),
        ("group", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("middle", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class Library:
    """A loaded library and what its host can run; or the reason why there is none."""

    path: str
    cdll: ctypes.CDLL | None
    isas: tuple[str, ...]
    problem: str = ""


@dataclass(frozen=True)
class Search:
    """How affine codes are found: by the first `shares` cuts of a group's range, or for these inputs, normalized."""

    shares: int
    inputs: Inputs | None = None


SEARCH = Search(len(SHARES))


@dataclass(frozen=True)
class Packed:
    """A weight's addresses; `weight` keeps the memory alive."""

    weight: Planes
    struct: Weight


class NativeBackend:
    """One ISA of the library; weights are read in place, mapped files too."""

    repacks = False

    def __init__(self, cdll: ctypes.CDLL, isa: str) -> None:
        self.isa, self.name = isa, f"native-{isa}"
        self._matmul, self._quantize, self._code = cdll.glm4_matmul, cdll.glm4_quantize, ISAS.index(isa)
        self._decoder_layers, self._fit = cdll.glm4_decoder_layers, cdll.glm4_fit

    def supports(self, weight: Planes) -> bool:
        return weight.device.type == "cpu" and all(t.is_contiguous() for t in weight.tensors().values())

    def prepack(self, weight: Planes) -> Packed:
        return Packed(weight, describe(weight))

    def unpack(self, packed: Packed) -> Planes:
        return packed.weight

    def matmul(self, x: Tensor, packed: Packed, bias: Tensor | None, splits: int = 1) -> Tensor:
        """x [M, K] -> [M, N] in x.dtype; x is quantized to int8 per 32 columns, sums are int32 and then float32.

        With `splits` 2 what the rounding left is quantized too and multiplied as well.
        """
        if x.device.type != "cpu":
            raise QuantError(f"the input of a layer is on {x.device} but its weight on the CPU")
        x = x.detach() if x.stride(-1) == 1 else x.detach().contiguous()
        out = torch.empty(x.shape[0], packed.struct.n, dtype=x.dtype)
        if out.numel() == 0:
            return out
        a = _Matrix(x.data_ptr(), x.shape[0], x.stride(0), DTYPES[x.dtype])
        y = _Matrix(out.data_ptr(), x.shape[0], out.stride(0), DTYPES[x.dtype])
        held = None if bias is None else bias.contiguous()
        where = None if held is None else held.data_ptr()
        refs = (ctypes.byref(packed.struct), ctypes.byref(a), where, ctypes.byref(y))
        code = self._matmul(*refs, splits, self._code, thread_count())
        if code != OK:
            raise MemoryError("no memory for the quantized activations")
        return out

    def quantize(self, source: _Matrix, target: Weight, how: Search, place: ctypes.Array[ctypes.c_int64]) -> int:
        """One of OK, NOT_FINITE (then `place` is the row and column) and NO_MEMORY."""
        given = None if how.inputs is None else ctypes.byref(_inputs(how.inputs, target.group))
        refs = (ctypes.byref(source), ctypes.byref(target), given, how.shares)
        return int(self._quantize(*refs, self._code, thread_count(), ctypes.byref(place)))

    def fit(
        self, source: _Matrix, target: _Grid, importance: Tensor | None, place: ctypes.Array[ctypes.c_int64]
    ) -> int:
        """As `quantize`, on another engine's grid."""
        where = None if importance is None else importance.data_ptr()
        refs = (ctypes.byref(source), ctypes.byref(target), where)
        return int(self._fit(*refs, self._code, thread_count(), ctypes.byref(place)))

    def decoder_layers(
        self, layers: Sequence[int], spans: ctypes.Array[Any], x: Tensor, cos: Tensor, sin: Tensor
    ) -> None:
        """`layers` by their addresses; `kernels.decoder` describes the arguments."""
        where = (ctypes.c_void_p * len(layers))(*layers)
        rows = (x.data_ptr(), cos.data_ptr(), sin.data_ptr())
        if self._decoder_layers(where, len(layers), spans, len(spans), *rows, self._code, thread_count()) != OK:
            raise MemoryError("no memory for the activations of a decoder layer")


def backend() -> NativeBackend | None:
    """The best ISA of this host, or the one GLM4LITE_ISA names; None where the library is missing."""
    library, forced = _library(), os.environ.get("GLM4LITE_ISA", "")
    if forced and forced not in ISAS:
        raise QuantError(f"GLM4LITE_ISA is {forced!r}; use one of {', '.join(ISAS)}")
    if library.cdll is None:
        if forced:
            raise QuantError(f"GLM4LITE_ISA={forced} cannot be used: {library.problem}")
        return None
    if forced and forced not in library.isas:
        raise QuantError(f"GLM4LITE_ISA={forced} cannot be used: this host has {', '.join(library.isas)}")
    return NativeBackend(library.cdll, forced or library.isas[-1])


def status() -> str:
    """One line for people: ISA, threads and path, or why the slow reference runs."""
    try:
        chosen, threads = backend(), thread_count()
    except QuantError as problem:
        return f"error: {problem}"
    library = _library()
    if chosen is None:
        return f"reference (plain torch, slow): {library.problem}"
    return f"{chosen.name}, {threads} thread(s), host has {', '.join(library.isas)} ({library.path})"


def thread_count() -> int:
    """As `set_threads` or GLM4LITE_THREADS say, at most a processor each; else what pays, at most torch's number."""
    text = os.environ.get("GLM4LITE_THREADS", "")
    if text and (not text.isascii() or not text.isdigit() or int(text) < 1):
        raise QuantError(f"GLM4LITE_THREADS is {text!r}; use a whole number of at least 1")
    if asked := _threads or int(text or 0):
        return min(len(host.processors()), asked)
    return min(host.cores().threads, torch.get_num_threads())


def check_environment() -> None:
    """QuantError where GLM4LITE_ISA or GLM4LITE_THREADS asks for what this host has not: said before any work."""
    backend()
    thread_count()


def set_threads(count: int) -> None:
    """The number of threads of torch and of the kernels, for this process alone; QuantError outside 1..processors."""
    most = len(host.processors())
    if not 1 <= count <= most:
        raise QuantError(f"{count} threads cannot be used; this process may use 1 to {most}")
    global _threads
    _threads = count
    torch.set_num_threads(count)


def read_all(data: Tensor) -> int:
    """Reads a contiguous CPU tensor once on the kernels' threads, and does nothing else: times memory bandwidth.

    Returns the sum of its 64-bit words (modulo 2**64, of whole 512-byte steps); without the library torch adds them.
    """
    cdll = _library().cdll
    if cdll is None:
        return int(data.view(torch.int64).sum())
    cdll.glm4_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32]
    cdll.glm4_read.restype = ctypes.c_uint64
    return int(cdll.glm4_read(data.data_ptr(), data.nbytes, thread_count()))


def quantize(weight: Tensor, target: Planes, how: Search, first_row: int) -> bool:
    """Fills `target` (whole tiles) from a CPU weight [R, K]; False where there is no library for it.

    The bytes are those of the reference. Raises QuantError at a value that is not finite.
    """
    chosen = backend()
    if chosen is None or weight.device.type != "cpu":
        return False
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    source = _Matrix(weight.data_ptr(), weight.shape[0], weight.stride(0), DTYPES[weight.dtype])
    where = (ctypes.c_int64 * 2)()
    _check(chosen.quantize(source, describe(target), how, where), weight, where, first_row)
    return True


def fit(
    rows: Tensor, group: int, dtype: torch.dtype, middle: bool, importance: Tensor | None, first_row: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(codes uint8 [R, K], scale and zero float32 [R, G]) of rows on the CPU; None where there is no library.

    The values are those of `kernels.whole_zero`. Raises QuantError at a value that is not finite.
    """
    chosen = backend()
    if chosen is None or rows.device.type != "cpu" or rows.dtype not in DTYPES:
        return None
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    count, columns = rows.shape
    codes = torch.empty(count, columns, dtype=torch.uint8)
    scale, zero = (torch.empty(count, columns // group) for _ in range(2))
    places = (codes.data_ptr(), scale.data_ptr(), zero.data_ptr())
    source = _Matrix(rows.data_ptr(), count, rows.stride(0), DTYPES[rows.dtype])
    where = (ctypes.c_int64 * 2)()
    code = chosen.fit(source, _Grid(*places, columns, group, SCALES[dtype], middle), importance, where)
    _check(code, rows, where, first_row)
    return codes, scale, zero


def _check(code: int, weight: Tensor, where: ctypes.Array[ctypes.c_int64], first_row: int) -> None:
    if code == NOT_FINITE:
        row, col = where[0], where[1]
        raise QuantError(not_finite(first_row + row, col, float(weight[row, col])))
    if code != OK:
        raise MemoryError("no memory to quantize a weight")


def describe(w: Planes) -> Weight:
    mins = None if w.mins is None else w.mins.data_ptr()
    row_min = None if w.row_min is None else w.row_min.data_ptr()
    planes = (w.qweight.data_ptr(), w.scales.data_ptr(), mins, w.row_scale.data_ptr(), row_min)
    return Weight(*planes, w.shape[0], w.shape[1], w.bits, w.group_size)


def _inputs(inputs: Inputs, group: int) -> _Inputs:
    importance, feedback = inputs.mean_square.data_ptr(), inputs.feedback
    if feedback is None:
        return _Inputs(importance, None, None, None, group, 0)
    parts = (part.data_ptr() for part in (feedback.within, feedback.onto, feedback.into))
    return _Inputs(importance, *parts, feedback.block, feedback.rank)


def _library() -> Library:
    return _load(os.environ.get("GLM4LITE_KERNELS", ""))


@lru_cache(maxsize=8)
def _load(override: str) -> Library:
    path = override or _find()
    if not path:
        return Library(
            "", None, (), f"no {_file_name()} is installed: install a wheel, or GCC or Clang and then reinstall"
        )
    try:
        cdll = ctypes.CDLL(path)
        version = cdll.glm4_abi_version()
    except (OSError, AttributeError) as problem:
        return Library(path, None, (), f"{path} cannot be loaded ({problem})")
    if version != ABI:
        return Library(path, None, (), f"{path} has interface {version}, this package needs {ABI}: reinstall")
    weight, matrix = ctypes.POINTER(Weight), ctypes.POINTER(_Matrix)
    cdll.glm4_matmul.argtypes = [weight, matrix, ctypes.c_void_p, matrix, *[ctypes.c_int32] * 3]
    numbers, place = [ctypes.c_int32] * 3, ctypes.POINTER(ctypes.c_int64 * 2)
    cdll.glm4_quantize.argtypes = [matrix, weight, ctypes.POINTER(_Inputs), *numbers, place]
    cdll.glm4_fit.argtypes = [matrix, ctypes.POINTER(_Grid), ctypes.c_void_p, *numbers[:2], place]
    pointer, whole = ctypes.c_void_p, ctypes.c_int32
    spans = (pointer, whole, pointer, whole)
    cdll.glm4_decoder_layers.argtypes = [*spans, *[pointer] * 3, whole, whole]
    isas = tuple(name for code, name in enumerate(ISAS) if cdll.glm4_isa_available(code))
    return Library(path, cdll, isas)


def _find() -> str:
    """The library in any folder of the package: an editable install keeps it away from the sources."""
    for folder in sys.modules["glm4lite_quant"].__path__:
        library = Path(folder) / _file_name()
        if library.is_file():
            return str(library)
    return ""


def _file_name() -> str:
    return f"glm4lite_kernels.{SUFFIXES.get(sys.platform, 'so')}"
