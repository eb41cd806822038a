"""Compiles the Triton kernels for GPUs that need not be here and prints what came out, one JSON object a line.

A process of its own, because where TRITON_INTERPRET is set nothing can be compiled.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from glm4lite_quant.config import BITS
from glm4lite_quant.kernels import triton_gpu, triton_kernels, triton_step, triton_step_kernels
from glm4lite_quant.kernels.decoder import BLOCK

POINTERS = {"qweight": "*i32", "scales": "*u8", "row_scale": "*fp32"}
AFFINE = {"mins": "*u8", "row_min": "*fp32"}
NUMBERS = ("tokens", "n", "k", "x_stride", "e4", "e8", "first")
FLOATS = dict.fromkeys(("x", "post_weight", "weight", "sums", "tops", "weights"), "*fp32")
FLOATS |= dict.fromkeys(("eps", "scale"), "fp32")
LIMIT = 99 << 10  # bytes of shared memory a program gets on a consumer's card


def compiled(kernel: Any, capability: int, warps: int, stages: int, types: dict[str, str], constants: Any) -> Any:
    """One kernel with aligned pointers and sizes that are multiples of 16, as at every GLM shape."""
    types = dict.fromkeys(NUMBERS, "i32") | types | dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in kernel.arg_names}
    aligned = [
        name
        for name, kind in signature.items()
        if kind.startswith("*") or name in ("n", "k", "x_stride", "block_stride", "head_stride", "size")
    ]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def steps(capability: int) -> dict[str, Any]:
    """The kernels between the products, at the 32B's shapes, with both kinds of cache."""
    whole = dict.fromkeys(("q", "k", "v", "cos", "sin", "added", "out", "gate_up"), "*bf16") | FLOATS
    whole |= {"rows": "*i32"} | dict.fromkeys(("size", "block_stride", "head_stride"), "i32")
    found: dict[str, Any] = {}
    for codes in (False, True):
        kind = "*i8" if codes else "*bf16"
        types = whole | {"keys": kind, "values": kind}
        scales = {} if codes else {"key_scale": None, "value_scale": None}
        types |= {"key_scale": "*fp32", "value_scale": "*fp32"} if codes else {}
        shape = {"DIM": 128, "BLOCK": BLOCK, "CODES": codes} | scales
        own = shape | {"QUERIES": 48, "HEADS": 2, "ROTARY": 64}
        found[f"rotate_store {kind}"] = compiled(triton_step_kernels.rotate_store, capability, 1, 2, types, own)
        for queries in (32, 64):  # a row each, or two of one sequence
            own = shape | {"SPLITS": 64, "GROUP": 24, "QUERIES": queries, "FACTOR": tl.bfloat16}
            stages = triton_step.attend_stages(torch.bfloat16)
            made = compiled(triton_step_kernels.attend, capability, 4, stages, types, own)
            found[f"attend {queries} {kind}"] = made
    types = whole | dict.fromkeys(("q", "k", "v", "keys", "values"), "*fp32")
    own = {"DIM": 128, "BLOCK": BLOCK, "CODES": False, "key_scale": None, "value_scale": None}
    own |= {"SPLITS": 64, "GROUP": 24, "QUERIES": 64, "FACTOR": tl.float32}
    stages = triton_step.attend_stages(torch.float32)
    found["attend 64 *fp32"] = compiled(triton_step_kernels.attend, capability, 4, stages, types, own)
    own = {"SPLITS": 64, "DIM": 128}
    found["combine"] = compiled(triton_step_kernels.combine, capability, 4, 2, whole, own)
    found["swiglu"] = compiled(triton_step_kernels.swiglu, capability, 4, 2, whole, {"BLOCK": 1024})
    for absent in (("post_weight",), ("added", "post_weight"), ("weight",), ()):
        own = {"BLOCK": 8192, "TYPE": tl.bfloat16} | dict.fromkeys(absent)
        found[f"add_norm without {absent}"] = compiled(triton_step_kernels.add_norm, capability, 16, 2, whole, own)
    return found


def main() -> None:
    for capability in (80, 89, 90):
        for name, made in steps(capability).items():
            row = {"kernel": f"{name}, sm_{capability}", "shared": made.metadata.shared, "whole": 0}
            print(json.dumps(row | {"fits": made.metadata.shared <= LIMIT}), flush=True)
        for bits in BITS:
            types = dict(POINTERS)
            constants: dict[str, Any] = {"BITS": bits, "GROUP": 32}
            types |= AFFINE if bits < 8 else {}
            constants |= {} if bits < 8 else dict.fromkeys(AFFINE)
            found: dict[str, Any] = {}
            for config in sorted(set(triton_gpu.GEMV.values()), key=repr):
                own = constants | {"TOKENS": 1, "BLOCKS": 8 * config.warps, "WHOLE": False, "STAGES": config.stages}
                for bias in (dict.fromkeys(("bias",)), dict[str, None]()):
                    floats = types | {"x": "*bf16", "out": "*bf16", "bias": "*fp32"}
                    made = compiled(triton_kernels.gemv, capability, config.warps, 3, floats, own | bias)
                    found[f"gemv {config} {bias}"] = made
            four = constants | {"TOKENS": 4, "BLOCKS": 64, "WHOLE": True, "STAGES": 2, "bias": None}
            floats = types | {"x": "*fp32", "out": "*fp32"}
            found["gemv of four tokens, float32"] = compiled(triton_kernels.gemv, capability, 8, 3, floats, four)
            for many in (triton_gpu.GEMM[0], triton_gpu.GEMM[-1]):
                own = constants | {"TOKENS": many.tokens, "TILES": many.tiles, "BLOCKS": many.blocks}
                own |= {"FACTOR": tl.bfloat16, "bias": None}
                floats = types | {"x": "*bf16", "out": "*bf16"}
                made = compiled(triton_kernels.gemm, capability, many.warps, many.stages, floats, own)
                found[f"gemm {many}"] = made
            own = constants | {"TILES": 1, "BLOCKS": 16}
            found["decode"] = compiled(triton_kernels.decode, capability, 4, 2, types | {"out": "*bf16"}, own)
            for name, made in found.items():
                whole = made.asm["ptx"].count("cp.async.cg.shared.global")
                row = {"kernel": f"{name}, int{bits}, sm_{capability}", "shared": made.metadata.shared, "whole": whole}
                print(json.dumps(row | {"fits": made.metadata.shared <= LIMIT}), flush=True)


if __name__ == "__main__":
    main()
