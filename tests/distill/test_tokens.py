from __future__ import annotations

import torch

from finedetr.distill.tokens import carry, slots_of

THREE = ((8, 8), (4, 4), (2, 2))
TWO = ((4, 4), (2, 2))


def test_common_levels_keep_their_cells() -> None:
    everything = torch.arange(84)[None]
    assert torch.equal(carry(everything, THREE, THREE), everything)
    assert torch.equal(carry(everything[:, 64:], THREE, TWO), torch.arange(20)[None])
    assert torch.equal(carry(torch.arange(20)[None], TWO, THREE), torch.arange(64, 84)[None])


def test_a_finer_level_goes_to_the_cell_around_it() -> None:
    row, column = 5, 2
    (found,) = carry(torch.tensor([[row * 8 + column]]), THREE, TWO)[0].tolist()
    assert found == (row // 2) * 4 + column // 2


def test_another_size_of_picture_keeps_the_place() -> None:
    table = carry(torch.arange(36)[None], ((6, 6),), ((8, 8),))[0]
    row, column = table // 8, table % 8
    center = torch.stack(((torch.arange(36) // 6 + 0.5) / 6, (torch.arange(36) % 6 + 0.5) / 6))
    assert ((torch.stack((row, column)) / 8 <= center) & (center < (torch.stack((row, column)) + 1) / 8)).all()


def test_queries_are_found_by_their_cell() -> None:
    tokens, own = torch.tensor([[3, 9, 5], [1, 2, 0]]), torch.tensor([[5, 3], [7, 8]])
    assert slots_of(tokens, own).tolist() == [[1, -1, 0], [-1, -1, -1]]
