"""Adapters in the page's sheet of models, in a browser."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from glm4lite.hub.sources import nano_folder
from tests.ui.conftest import Serve

Visit = Callable[..., Any]


def adapter_of_nano(folder: Path, width: int) -> Path:
    """Of the first layer's down_proj, as PEFT writes it; `width` of what it is for."""
    made, name = torch.Generator().manual_seed(0), "base_model.model.model.layers.0.mlp.down_proj"
    a, b = torch.randn(2, width, generator=made), torch.randn(256, 2, generator=made)
    folder.mkdir()
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}', encoding="utf-8")
    return folder


def test_a_model_is_loaded_with_adapters_and_wrong_ones_leave_the_old(
    serve: Serve, visit: Visit, tmp_path: Path
) -> None:
    width = json.loads((nano_folder() / "config.json").read_text(encoding="utf-8"))["intermediate_size"]
    right, wrong = adapter_of_nano(tmp_path / "right", width), adapter_of_nano(tmp_path / "wrong", width + 32)
    site = serve()
    page, before = visit(site.url), site.runtime.engine
    page.click("#open-model")
    page.fill("#source", "nano")
    bad = {str(wrong): "is for another model", f"{right}=loud": "no scale", str(tmp_path): "no adapter"}
    for lines, said in bad.items():
        page.fill("#lora", lines)
        for button in ("Will it fit?", "Load"):
            page.get_by_role("button", name=button, exact=True).click()
            page.wait_for_selector(f"#load-progress:has-text('{said}')")
    visit.errors.clear()  # type: ignore[attr-defined]  # Chromium logs each answer that is a refusal
    assert site.runtime.engine is before
    page.fill("#lora", f"{right}=0.5\n\n  {right}\n")
    page.click("#plan")
    page.wait_for_selector(f"#planned:has-text('nano + {right}=0.5 + {right}')")
    page.get_by_role("button", name="Load", exact=True).click()
    page.wait_for_selector("#load-progress >> text=is loaded")
    assert site.runtime.lora == (f"{right}=0.5", str(right))
    page.wait_for_selector(f"#facts:has-text('{right}=0.5')")
    ids = torch.tensor([[5, 9, 133]])
    with torch.no_grad():
        assert not torch.equal(site.runtime.engine.model(ids).logits, before.model(ids).logits)
