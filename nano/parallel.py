"""Training by several single-threaded processes on one CPU.

Each process has its own batches and its own gradients; the parameters lie in shared memory, and each process updates
its share of them with the mean gradient. The processes meet twice a step, not in every matrix product, so that a busy
machine slows training down by what it takes and no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Team:
    """What the processes share: one row of gradients each, the barrier, and the stop sign (int32 [1])."""

    gradients: Tensor
    barrier: Barrier
    stop: Tensor

    @classmethod
    def create(cls, model: nn.Module, workers: int, context: Any) -> Team:
        """The shared memory for `workers` processes; the model's parameters are moved there, too."""
        model.share_memory()
        total = sum(parameter.numel() for parameter in model.parameters())
        rows = torch.zeros(workers, total).share_memory_()
        return cls(rows, context.Barrier(workers), torch.zeros(1, dtype=torch.int32).share_memory_())

    @property
    def workers(self) -> int:
        return len(self.gradients)


def owners(model: nn.Module, workers: int) -> dict[str, int]:
    """Which process updates which parameter: the largest first, each to the least loaded one."""
    load = [0] * workers
    owner: dict[str, int] = {}
    for name, parameter in sorted(model.named_parameters(), key=lambda item: (-item[1].numel(), item[0])):
        least = load.index(min(load))
        owner[name] = least
        load[least] += parameter.numel()
    return owner


def exchange(model: nn.Module, team: Team, rank: int, owner: dict[str, int]) -> None:
    """Puts this process's gradients on the table, then takes the mean gradients of the parameters it owns."""
    if team.workers == 1:
        return
    position = 0
    for parameter in model.parameters():
        if parameter.grad is not None:
            team.gradients[rank, position : position + parameter.numel()].copy_(parameter.grad.flatten())
        position += parameter.numel()
    team.barrier.wait()
    position = 0
    for name, parameter in model.named_parameters():
        if owner[name] == rank:
            mean = team.gradients[:, position : position + parameter.numel()].mean(0)
            parameter.grad = mean.view_as(parameter)
        else:
            parameter.grad = None
        position += parameter.numel()


def meet(team: Team) -> bool:
    """Waits for the others; whether to go on."""
    if team.workers > 1:
        team.barrier.wait()
    return int(team.stop[0]) == 0
