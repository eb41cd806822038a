"""bfloat16 in a Hugging Face folder: what Transformers, vLLM and every other tool begin with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm4lite.base.files import COMPANIONS, CONFIG
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.load_plan import Fill
from glm4lite.checkpoint.prepare import Prepared
from glm4lite.checkpoint.quantize import destination_folder
from glm4lite.checkpoint.writer import FolderWriter, PlannedTensor
from glm4lite_quant import QuantConfig
from glm4lite_quant.format import Codes
from glm4lite_quant.grids import Grid

_OF_REMOTE_CODE = ("auto_map", "_name_or_path")
_CLASSES = {"glm4": "Glm4ForCausalLM", "glm": "GlmForCausalLM"}


class HuggingFaceTarget:
    """Each parameter under its own name."""

    quant: QuantConfig | None = None

    def destination(self, path: str | Path) -> Path:
        return destination_folder(path)

    def check(self, prepared: Prepared[Any]) -> None:
        """Transformers runs whatever glm4lite does."""

    def grid(self, fill: Fill) -> Grid | None:
        return None

    def planned(self, fill: Fill) -> list[PlannedTensor]:
        return [PlannedTensor(fill.source, torch.bfloat16, fill.shape)]

    def encoded(self, fill: Fill, rows: Tensor | Codes) -> Mapping[str, Tensor]:
        values = rows if isinstance(rows, Tensor) else rows.decoded()
        return {fill.source: values.to(torch.bfloat16)}

    def writer(self, path: Path, planned: list[PlannedTensor], prepared: Prepared[Any]) -> FolderWriter:
        return FolderWriter(path, planned)

    def finish(self, writer: FolderWriter, prepared: Prepared[Any]) -> None:
        writer.write_json(CONFIG, self.config(prepared))
        writer.copy(prepared.checkpoint.folder / name for name in COMPANIONS)

    def config(self, prepared: Prepared[Any]) -> dict[str, Any]:
        """config.json."""
        values = plain_config(prepared.checkpoint, prepared)
        key = "dtype" if "dtype" in values else "torch_dtype"
        return {**values, "architectures": values.get("architectures") or [_CLASSES[prepared.config.model_type]]} | {
            key: "bfloat16"
        }


def plain_config(checkpoint: Checkpoint, prepared: Prepared[Any]) -> dict[str, Any]:
    """What config.json says of the model itself, in today's words; nothing of how its weights are stored."""
    legacy = checkpoint.config.get("model_type") == "chatglm"
    values = prepared.config.to_diff_dict() if legacy else dict(checkpoint.config)
    if legacy:
        values.pop("architectures", None)
    dropped = (*_OF_REMOTE_CODE, "quantization_config", "quantization")
    return {key: value for key, value in values.items() if key not in dropped}
