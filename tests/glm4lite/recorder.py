"""What a CUDA graph does, without one: the work's operations are recorded with the memory they use and done again.

As there, addresses and Python's decisions are frozen, memory that the work allocated is reused at every replay, and
asking the device for a number while recording is an error. Triton's kernels run in its interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

from glm4lite.runtime import cuda_graph

SYNCHRONIZING = ("item", "_local_scalar_dense", "nonzero", "is_nonzero", "equal")


class Recorder:
    """Stands for `cuda_graph.record`; `recordings` counts its calls, `replays` those of what it gave."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0
        self.launch: Callable[..., Any] = InterpretedFunction.run

    def record(self, work: Callable[[], None], device: torch.device, memory: object = None) -> cuda_graph.Recording:
        work()
        steps: list[Callable[[], object]] = []
        launch = self.launch

        def launched(kernel: Any, *args: Any, **options: Any) -> None:
            steps.append(lambda: launch(kernel, *args, **options))
            with _disable_current_modes():
                launch(kernel, *args, **options)

        InterpretedFunction.run = launched
        try:
            with _Operations(steps):
                work()
        finally:
            InterpretedFunction.run = launch
        self.recordings += 1

        def replay() -> None:
            self.replays += 1
            for step in steps:
                step()

        return cuda_graph.Recording(replay, memory or object())


def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Recorded decoding on whatever device there is, with small steps of a cache of its own."""
    made = Recorder()
    if not torch.cuda.is_available():
        monkeypatch.setattr(cuda_graph, "record", made.record)
        monkeypatch.setattr(cuda_graph, "records", lambda device: True)
        monkeypatch.setattr("glm4lite_quant.kernels.gpu.problem", lambda name, device: "")
        monkeypatch.setattr("glm4lite.model.layer_cache.STEP", 16)
        for name, few in (("PARTS", 2), ("LEAST_SPLITS", 2)):  # the interpreter runs programs in turn
            monkeypatch.setattr(f"glm4lite_quant.kernels.triton_step.{name}", few)
    monkeypatch.setattr("glm4lite.model.layer_cache.GPU_STEP", 16)
    return made


class _Operations(TorchDispatchMode):
    """Records torch's operations in between."""

    def __init__(self, steps: list[Callable[[], object]]) -> None:
        super().__init__()
        self.steps = steps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1].rstrip("_")
        if name in SYNCHRONIZING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        out = func(*args, **kwargs)
        written = any(value.alias_info and value.alias_info.is_write for value in func._schema.returns)
        if written:
            self.steps.append(lambda: func(*args, **kwargs))
        elif "empty" not in name and not _memory(out) <= _memory((args, kwargs)):  # views stay what they are
            self.steps.append(lambda: _again(out, func(*args, **kwargs)))
        return out


def _memory(values: Any) -> set[int]:
    return {value.untyped_storage().data_ptr() for value in tree_leaves(values) if isinstance(value, torch.Tensor)}


def _again(recorded: Any, new: Any) -> None:
    for old, value in zip(tree_leaves(recorded), tree_leaves(new), strict=True):
        old.copy_(value)
