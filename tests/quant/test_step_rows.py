"""What a recorded step reads of its rows: whose each is, where its blocks lie, which share what they read."""

from __future__ import annotations

import pytest
import torch

from glm4lite_quant.kernels.decoder import Heads
from glm4lite_quant.kernels.step_rows import SequenceRows, StepRows, tile_rows

CPU = torch.device("cpu")


def table(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def test_rows_positions_tables_and_tiles_stand_one_behind_the_other() -> None:
    rows = StepRows(8, 4, 2, CPU)
    assert rows.set([SequenceRows(64, 3, table(5, 2)), SequenceRows(0, 1, table(7, 9))]) == 4
    positions, places, firsts, counts = rows.memory[:32].view(4, 8).tolist()
    assert positions == [64, 65, 66, 0, -1, -1, -1, -1]
    assert firsts == [0, 2, 3, 0, 0, 0, 0, 0]
    assert counts == [2, 1, 1, 0, 0, 0, 0, 0]
    assert [rows.memory[place : place + 2].tolist() for place in places[:3]] == [[5, 2]] * 3
    assert int(rows.memory[places[3]]) == 7


def test_nothing_is_left_of_the_step_before() -> None:
    rows, fresh = StepRows(4, 3, 1, CPU), StepRows(4, 3, 1, CPU)
    rows.set([SequenceRows(190, 2, table(1, 2, 0)), SequenceRows(9, 2, table(4))])
    for each in (rows, fresh):
        each.set([SequenceRows(63, 1, table(8))])
    assert torch.equal(rows.memory[:17], fresh.memory[:17])
    assert rows.memory[:4].tolist() == [63, -1, -1, -1]


@pytest.mark.parametrize(
    "wrong",
    [
        [SequenceRows(0, 1, table(1))] * 5,
        [SequenceRows(64, 1, table(1))],
        [SequenceRows(0, 0, table(1))],
        [SequenceRows(200, 1, table(1, 2, 3, 4))],
    ],
    ids=["too many rows", "no block for the row", "no rows", "more blocks than there are"],
)
def test_what_would_be_written_elsewhere_is_refused(wrong: list[SequenceRows]) -> None:
    rows = StepRows(4, 3, 1, CPU)
    before = rows.memory.clone()
    with pytest.raises(ValueError, match="fit"):
        rows.set(wrong)
    assert torch.equal(rows.memory, before)


def test_rows_of_one_sequence_share_a_product_of_64_queries() -> None:
    shapes = (Heads(32, 2, 128, 64), Heads(48, 2, 128, 64), Heads(48, 8, 128, 64), Heads(128, 1, 128, 64))
    assert [tile_rows(heads) for heads in shapes] == [4, 2, 10, 1]
