"""Assembly of global tensors from the slices that the ranks of a test return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def global_weights(results: list[dict[str, Any]], key: str = "weights") -> dict[str, Tensor]:
    """Assemble every parameter, and check that its replicas are equal."""
    slices: dict[str, dict[int, Tensor]] = {}
    splits: dict[str, tuple[int | None, int]] = {}
    for result in results:
        for name, (dim, blocks, rank, value) in result[key].items():
            seen = slices.setdefault(name, {})
            where = 0 if dim is None else rank
            if where in seen:
                torch.testing.assert_close(
                    value, seen[where], rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"replicas of {n}: {m}"
                )
            seen[where] = value
            splits[name] = (dim, blocks)
    whole = {}
    for name, by_rank in slices.items():
        dim, blocks = splits[name]
        if dim is None:
            whole[name] = by_rank[0]
            continue
        chunks = [by_rank[rank].chunk(blocks, dim=dim) for rank in sorted(by_rank)]
        whole[name] = torch.cat([chunk[block] for block in range(blocks) for chunk in chunks], dim=dim)
    return whole


def global_memory(results: list[dict[str, Any]]) -> dict[int, tuple[Tensor, ...]]:
    """Assemble the memory of every layer: (M [rows, G, D, D], z [rows, G, D]), or the fields of a baseline.

    Counters and memory tokens have no head dimension, so every rank returns them whole.
    """
    grids: dict[int, dict[tuple[int, int], tuple[Tensor, ...]]] = {}
    for result in results:
        for layer, (row, head, *fields) in result["memory"].items():
            grids.setdefault(layer, {})[row, head] = tuple(fields)
    whole = {}
    for layer, grid in grids.items():
        rows, heads = max(row for row, _ in grid) + 1, max(head for _, head in grid) + 1

        def of_row(row: int, field: int, grid: Any = grid, heads: int = heads, layer: int = layer) -> Tensor:
            slices = [grid[row, head][field] for head in range(heads)]
            whole_in_each = slices[0].dim() == 1 or any(layer in result.get("not_by_head", ()) for result in results)
            return slices[0] if whole_in_each else torch.cat(slices, dim=1)

        fields = range(len(grid[0, 0]))
        whole[layer] = tuple(torch.cat([of_row(row, field) for row in range(rows)]) for field in fields)
    return whole
