"""The functions that `hidden_act` may name: those of Transformers (`ACT2FN`) that have no weights of their own.

GLM-4 uses silu; only that has native and Triton code, a model with another one runs as torch code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gelu_10(x: Tensor) -> Tensor:
    return F.gelu(x).clip(-10, 10)


def _laplace(x: Tensor) -> Tensor:
    """The normal distribution's cumulative function with mean 0.707107 and deviation 0.282095, as MEGA uses it."""
    return 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2))))


def _linear(x: Tensor) -> Tensor:
    return x


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _sqrtsoftplus(x: Tensor) -> Tensor:
    return F.softplus(x).sqrt()


_tanh_gelu = partial(F.gelu, approximate="tanh")

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_10": _gelu_10,
    "gelu_fast": _tanh_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_accurate": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "gelu_python_tanh": _tanh_gelu,
    "quick_gelu": _quick_gelu,
    "hardswish": F.hardswish,
    "laplace": _laplace,
    "leaky_relu": F.leaky_relu,
    "linear": _linear,
    "mish": F.mish,
    "relu": F.relu,
    "relu2": _relu2,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": _sqrtsoftplus,
    "tanh": torch.tanh,
}
"""By name; those of one line are one function, which differ in Transformers by rounding alone."""

WITH_WEIGHTS = ("prelu", "xielu")
"""Activations with weights of their own, which no GLM-4 checkpoint has."""
