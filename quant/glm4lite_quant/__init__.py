"""int4 and int8 weights for linear layers and embeddings: the format, the modules that use it and their CPU kernels;
4-bit weights as bitsandbytes stores them.

Usable without glm4lite: `QuantTensor.quantize(weight, QuantConfig())`, then `QuantLinear(...).load(tensor)`.
"""

from glm4lite_quant.bnb import BnbConfig, BnbLinear, BnbTensor
from glm4lite_quant.config import Calibration, Codec, QuantConfig, QuantError
from glm4lite_quant.inputs import Inputs
from glm4lite_quant.linear import QuantEmbedding, QuantLinear
from glm4lite_quant.tensor import QuantTensor

__all__ = [
    "BnbConfig",
    "BnbLinear",
    "BnbTensor",
    "Calibration",
    "Codec",
    "Inputs",
    "QuantConfig",
    "QuantEmbedding",
    "QuantError",
    "QuantLinear",
    "QuantTensor",
]
