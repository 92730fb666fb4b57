"""Change inputs: a site and what to do to its input in, the hook that does it while its block is calibrated out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from qpass.activation_args import ActivationArgs
from qpass.calibrate.watch_inputs import input_of
from qpass.kernels.reference.activation import quantize_asymmetric, quantize_symmetric

if TYPE_CHECKING:
    from qpass.calibrate.block_work import SiteWork


def rounded(x: Tensor, args: ActivationArgs) -> Tensor:
    """`x` [..., K] as the product sees it once its dynamic quantization has rounded it."""
    if args.symmetric:
        q, scale = quantize_symmetric(x)
        return (q.float() * scale).to(x.dtype)
    q, scale, zero_point = quantize_asymmetric(x)
    return ((q.float() - zero_point) * scale).to(x.dtype)


def rounds_input(work: SiteWork) -> bool:
    """Whether `rounding_hook` can round this site's input: int8 per token, in a module of its own."""
    args = work.spec.activation
    return args is not None and work.site.swap == "module" and (
        args.type, args.bits, args.granularity, args.dynamic) == ("int", 8, "per_token", True)


def rounding_hook(work: SiteWork, *, straight_through: bool = False) -> Callable[..., Any] | None:
    """A forward pre-hook, to be registered with kwargs, that rounds the site's input as its scheme says, for int8 per
    token in a module of its own.

    `straight_through` lets gradients pass as if nothing was rounded.
    """
    args = work.spec.activation
    if args is None or not rounds_input(work):
        return None

    return input_hook(lambda x: x + (rounded(x, args) - x).detach() if straight_through else rounded(x, args))


def input_hook(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A forward pre-hook, to be registered with kwargs, that puts `change` of a layer's input in its place."""
    def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        x = input_of(given, named)
        y = change(x)
        return tuple(y if value is x else value for value in given), {
            name: y if value is x else value for name, value in named.items()}

    return hook
