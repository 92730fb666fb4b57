"""Rotation mathematics: a width and a seed in, an orthogonal matrix near Hadamard's out, applied without being formed.

Hadamard matrices of 2^a by Sylvester, of q + 1 and 2 (q + 1) by Paley (q a prime that leaves 3, or 1, when divided by
4), and their Kronecker products. A width that no product of those reaches has a random orthogonal factor instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

_LARGEST = 64  # of a power of two that is multiplied at once
_ORDERS = 4  # how many doublings of the odd part are looked at: 4 m, 8 m, 16 m, ...


@dataclass(frozen=True, kw_only=True)
class Orthogonal:
    """An orthogonal matrix Q [n, n]: diag(signs) H, or H diag(signs) H^T if `keeps_mean`.

    factors      orthogonal matrices, float32, whose Kronecker product is H; the first column of each is constant
    signs        float32 [n], 1 or -1
    keeps_mean   Q maps the vector of ones to itself, so that the mean and the variance of x and x Q are equal
    """

    factors: tuple[Tensor, ...]
    signs: Tensor
    keeps_mean: bool

    def turn(self, x: Tensor) -> Tensor:
        """x Q for x [..., n], in float32."""
        x = x.float()
        signs = self.signs.to(x.device)
        if self.keeps_mean:
            return self._multiply(self._multiply(x, transposed=False) * signs, transposed=True)
        return self._multiply(x * signs, transposed=False)

    def _multiply(self, x: Tensor, *, transposed: bool) -> Tensor:
        """x H or x H^T, one factor after another."""
        shape, after = x.shape, self.signs.numel()
        for factor in self.factors:
            size = factor.shape[0]
            after //= size
            matrix = (factor.T if transposed else factor).to(x.device)
            x = torch.einsum("...ab,ac->...cb", x.reshape(*shape[:-1], -1, size, after), matrix)
        return x.reshape(shape)


def hadamard_like(width: int, seed: int, *, keeps_mean: bool) -> Orthogonal:
    """The matrix of a width; equal seeds give equal ones."""
    draw = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (width,), generator=draw).float() * 2 - 1
    if keeps_mean:
        signs[0] = 1.0  # the first column of H is constant: the vector of ones stays
    return Orthogonal(factors=_factors(width, draw), signs=signs, keeps_mean=keeps_mean)


def _factors(width: int, draw: torch.Generator) -> tuple[Tensor, ...]:
    power = width & -width
    odd = width // power
    found = []
    if odd > 1:
        orders = [odd << k for k in range(2, 2 + _ORDERS) if odd << k <= width and width % (odd << k) == 0]
        order = next((n for n in orders if _paley_prime(n)), None)
        found.append(_random_orthogonal(odd, draw) if order is None else _paley(order))
        power = width // found[0].shape[0]
    while power > 1:
        size = min(power, _LARGEST)
        found.append(_sylvester(size))
        power //= size
    return tuple(found) or (torch.ones(1, 1),)


@cache
def _sylvester(n: int) -> Tensor:
    h = torch.ones(1, 1)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h.div(n**0.5)


def _paley_prime(n: int) -> int | None:
    """The prime of Paley's constructions for order n, whose residue by 4 says which of the two; None if neither is."""
    for q, residue in ((n - 1, 3), (n // 2 - 1, 1)):
        if q > 2 and q % 4 == residue and all(q % d for d in range(2, int(q**0.5) + 1)):
            return q
    return None


@cache
def _paley(n: int) -> Tensor:
    """Paley's Hadamard matrix of order n (1933), divided by sqrt(n), its first column made positive."""
    q = _paley_prime(n)
    assert q is not None
    squares = {(i * i) % q for i in range(1, q)}
    chi = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)])
    jacobsthal = chi[(torch.arange(q)[:, None] - torch.arange(q)) % q]
    border = torch.zeros(q + 1, q + 1)
    border[0, 1:] = 1.0
    border[1:, 1:] = jacobsthal
    if q % 4 == 3:
        border[1:, 0] = -1.0
        h = torch.eye(q + 1) + border
    else:
        border[1:, 0] = 1.0
        h = torch.kron(border, torch.tensor([[1.0, 1.0], [1.0, -1.0]])) + torch.kron(
            torch.eye(q + 1), torch.tensor([[1.0, -1.0], [-1.0, -1.0]]))
    return (h * h[:, :1]).div(n**0.5)


def _random_orthogonal(n: int, draw: torch.Generator) -> Tensor:
    """A random orthogonal matrix whose first column is constant."""
    start = torch.randn(n, n, generator=draw, dtype=torch.float64)
    start[:, 0] = 1.0
    q, r = torch.linalg.qr(start)
    found: Tensor = q * r.diagonal().sign()
    return found.float()
