"""Routing: which experts each token chose in, rows sorted by expert in whole blocks out; no number leaves the GPU.

With P = T * top_k places and blocks of B rows, the places of each expert are put side by side and filled up to whole
blocks. At most ceil(P / B) + min(E, P) blocks are needed, and never more than P; those not needed have owner -1, so
that of an expert that nobody chose nothing is read, and a graph of fixed sizes can be captured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.kernels.cuda.launch import Grouping


def group_rows(index: Tensor, experts: int, block: int) -> Grouping:
    """index int [T, top_k] -> slots int32 [blocks * block], each a place t * top_k + j, or T * top_k for none, and
    owners int32 [blocks]. Places whose index is no expert stand nowhere."""
    places = index.numel()
    flat = index.reshape(-1).long()
    chosen = torch.where((flat >= 0) & (flat < experts), flat, experts)
    ordered, order = chosen.sort(stable=True)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=index.device).scatter_add_(
        0, chosen, torch.ones_like(chosen))
    starts = counts.cumsum(0) - counts
    blocks_of = (counts + block - 1) // block
    blocks_of[experts] = 0
    first_block = blocks_of.cumsum(0) - blocks_of
    # A place of none goes to one slot past the end, which is cut off.
    blocks = min(places, -(-places // block) + min(experts, places))
    at = first_block[ordered] * block + torch.arange(places, device=index.device) - starts[ordered]
    at = torch.where(ordered < experts, at, blocks * block)
    slots = torch.full((blocks * block + 1,), places, dtype=torch.int32, device=index.device)
    slots = slots.scatter(0, at, order.int())[:-1]
    number = torch.arange(blocks, device=index.device)
    owners = torch.searchsorted(first_block[:experts] + blocks_of[:experts], number, right=True).int()
    owners = torch.where(number < blocks_of.sum(), owners, -1)
    return Grouping(slots=slots, owners=owners.int(), places=index.shape[1], block=block)
