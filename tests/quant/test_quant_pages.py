"""Memory for weights, their own or a file's: aligned, and asked for in huge pages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from glm4lite_quant import QuantConfig, QuantTensor, pages


def flags_of(tensor: torch.Tensor) -> set[str]:
    """The flags of the mapping that holds a tensor, as the kernel tells them."""
    address, inside = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return set(line.split()[1:])
    raise AssertionError(f"no mapping at {address:#x}")


@pytest.mark.parametrize("nbytes", [1, 5000, pages.HUGE + 1])
def test_memory_is_aligned_zero_and_can_be_written(nbytes: int) -> None:
    memory = pages.zeros(nbytes)
    assert memory.shape == (nbytes,)
    assert memory.data_ptr() % 4096 == 0
    assert not memory.any()
    assert memory.fill_(3).sum() == 3 * nbytes


def test_memory_that_cannot_be_had_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="cannot be had"):
        pages.zeros(1 << 60)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how memory is mapped")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages")
def test_the_codes_of_a_large_weight_lie_in_huge_pages() -> None:
    large = QuantTensor.empty(4096, 4096, QuantConfig())
    assert "hg" in flags_of(large.qweight)
    assert "hg" not in flags_of(QuantTensor.empty(16, 64, QuantConfig()).qweight)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how memory is mapped")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages")
def test_a_large_file_is_mapped_in_huge_pages_and_what_is_written_to_the_map_stays_out_of_it(tmp_path: Path) -> None:
    for nbytes in (4096, pages.HUGE):
        path = tmp_path / str(nbytes)
        path.write_bytes(b"\x07" * nbytes)
        with path.open("rb") as file:
            memory = torch.frombuffer(pages.mapped(file.fileno()), dtype=torch.uint8)
        assert ("hg" in flags_of(memory)) == (nbytes >= pages.HUGE)
        assert memory.sum() == 7 * nbytes
        memory.fill_(9)
        assert path.read_bytes() == b"\x07" * nbytes
