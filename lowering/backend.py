"""Backend: `torch.compile(model, backend="qpass")`, Inductor with the pipeline in it for this one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx


def qpass_backend(gm: fx.GraphModule, example_inputs: Sequence[Tensor], *, mode: str | None = None,
                  options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """Compile a graph of Dynamo's. `mode` and `options` are those of Inductor; passes in `options` run first."""
    from torch._inductor import config as inductor_config
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    from qpass.lowering.install import chained

    given = {**(list_mode_options(mode) if mode else {}), **(options or {})}
    with inductor_config.patch(given):
        compiled: Any = compile_fx(gm, list(example_inputs), config_patches={**given, **chained()})
    return compiled  # type: ignore[no-any-return]
