"""Block work: one block in float32, its calls and its sites in; what algorithms observe and change of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from qpass.calibrate.activation_store import ActivationStore
from qpass.calibrate.blocks import Block
from qpass.calibrate.change_inputs import input_hook, rounding_hook
from qpass.calibrate.kept_outputs import KeptOutputs
from qpass.calibrate.pairs import Pair
from qpass.calibrate.watch_inputs import OnInput, watch_inputs
from qpass.decide.decision import Decision
from qpass.errors import CalibrationError
from qpass.hadamard import multiply_blocks
from qpass.input_change import InputChange
from qpass.recipes.algorithm_table import Algorithm
from qpass.site import Site
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight, dequantize_weight, quantize_weight

if TYPE_CHECKING:
    from qpass.calibrate.experts import ExpertsWork


@dataclass(eq=False, kw_only=True)
class SiteWork:
    """One site of the block: its parameter, the integers found for it so far, and what its layer does to its input."""

    site: Site
    spec: LinearSpec
    parameter: nn.Parameter
    owner: nn.Module
    canonical: CanonicalWeight | None = None
    change: InputChange = field(default_factory=InputChange)
    _exact: Tensor | None = None

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def on_grid(self) -> bool:
        """Whether the weight is rounded to integers on scales of rows or of groups along a row."""
        return (self.spec.weight.type == "int" and len(self.site.shape) == 2
                and self.spec.weight.granularity in ("per_tensor", "per_channel", "per_group"))

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype in which scales are stored: the model's own for this weight, float32 at most."""
        return self.site.dtype if self.site.dtype.itemsize <= 4 else torch.float32

    @property
    def weight(self) -> Tensor:
        """The weight as the block multiplies with it now, float32 [N, K]."""
        data = self.parameter.detach()
        return data.t() if self.site.transposed else data

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.parameter.data = value.t().contiguous() if self.site.transposed else value.contiguous()

    @property
    def exact(self) -> Tensor:
        """The float weight that the site's integers stand for, float32 [N, K]."""
        return self.weight if self._exact is None else self._exact

    @property
    def takes_change(self) -> bool:
        """Whether the layer can change its input at run time: it is a module of its own, and has its weight alone."""
        return takes_change(self.site, self.spec)

    def settle(self, canonical: CanonicalWeight) -> None:
        """These integers are the result; from now on the block multiplies with what they stand for."""
        self._exact = self.exact
        self.canonical = canonical
        self.weight = dequantize_weight(canonical, self.spec)


@dataclass(eq=False, kw_only=True)
class BlockWork:
    """A block while it is calibrated.

    calls    arguments of the block, one a sample, in float32: those that the algorithms calibrate on
    masks    one a sample: which tokens [B, T] count, None if all do
    notes    sentences for the report
    tell     shows a few words in the progress line
    targets  the float model's outputs of the block, one a sample, if an algorithm matches them; empty until
             `fill_targets`
    float_calls  the block's arguments in the float model, one a sample, likewise
    pairs    inputs within the block whose channels can be rescaled
    experts  modules of experts within the block
    keep     takes the float block's outputs from the first observation, if they are wanted
    seed     of whatever an algorithm draws at random here
    kept     what modules gave on `calls` and, since nothing that they depend on has changed, would give again
    """

    block: Block
    module: nn.Module
    sites: dict[str, SiteWork]
    calls: ActivationStore
    masks: Sequence[Tensor | None]
    aimed: Mapping[Algorithm, frozenset[str]]
    notes: list[str] = field(default_factory=list)
    tell: Callable[[str], None] = lambda text: None
    pairs: Sequence[Pair] = ()
    experts: Sequence[ExpertsWork] = ()
    targets: ActivationStore | None = None
    float_calls: ActivationStore | None = None
    keep: ActivationStore | None = None
    seed: int = 0
    kept: KeptOutputs | None = None
    _hooks: dict[str, RemovableHandle] = field(default_factory=dict)

    def change_input(self, site: SiteWork, change: InputChange) -> None:
        """From now on the site's module changes its input so; whoever asks takes the inverse into the weight."""
        if site.name in self._hooks:
            self._hooks.pop(site.name).remove()
        site.change = change
        if change:
            self._hooks[site.name] = site.owner.register_forward_pre_hook(input_hook(change), with_kwargs=True)

    def mix_inputs(self, sizes: Mapping[str, int]) -> None:
        """Let the sites named here mix their inputs from now on, in blocks of so many channels."""
        for name, size in sizes.items():
            if (site := self.sites.get(name)) is not None:
                self.change_input(site, replace(site.change, hadamard=size))
                site.weight = multiply_blocks(site.weight.float(), size)

    def take_off_hooks(self) -> None:
        """Leave the modules of the block as they were."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()

    def fill_targets(self) -> None:
        """Compute `targets` if they are wanted and not there; only while the block gives what the float one does."""
        if self.targets is not None and not len(self.targets):
            for output in self.outputs(self.float_calls):
                self.targets.append(output)

    def chosen(self, algorithm: Algorithm) -> list[SiteWork]:
        """The sites that this algorithm works on, in order."""
        names = self.aimed[algorithm]
        return [work for name, work in self.sites.items() if name in names]

    def round_the_rest(self) -> list[str]:
        """Round to nearest, from float32, what no algorithm has settled; returns the names of all that were left."""
        left = [site for site in self.sites.values() if site.canonical is None]
        for site in left:
            if site.on_grid:
                site.settle(quantize_weight(site.weight.float(), site.spec, site.scale_dtype))
        return [site.name for site in left]

    @contextmanager
    def exact_weights(self) -> Iterator[None]:
        """Within, the block multiplies with the float weights that its integers stand for."""
        settled = [(site, site.weight) for site in self.sites.values() if site.canonical is not None]
        try:
            for site, _ in settled:
                site.weight = site.exact
            yield
        finally:
            for site, weight in settled:
                site.weight = weight

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The block's parameters by their name in the model."""
        start = f"{self.block.path}." if self.block.path else ""
        return {start + name: parameter for name, parameter in self.module.named_parameters()}

    def never_reached(self, names: Sequence[str]) -> None:
        """Raise CalibrationError: no token of the calibration data came to these sites."""
        raise CalibrationError(f"the calibration data never reached {', '.join(names)}; add samples that do, or add "
                               "the layers to ignore")

    def outputs(self, calls: Iterable[Any] | None = None) -> Iterator[Any]:
        """What the block gives for each of its calls, as it is now."""
        kept = self.kept if calls is None else None
        with torch.no_grad(), self.rounding_activations():
            for number, (args, kwargs) in enumerate(self.calls if calls is None else calls):
                with nullcontext() if kept is None else kept.answering(number):
                    output = self.module(*args, **kwargs)
                yield output

    def forget_kept(self) -> None:
        """From now on every module is run again: something has changed."""
        if self.kept is not None:
            self.kept.clear()
        self.kept = None

    def observe(self, names: Iterable[str], on_input: OnInput, calls: Iterable[Any] | None = None) -> None:
        """Run the block on every call; `on_input(site, x)` gets each named site's input as float32 rows [T, K].

        Rows of masked tokens are left out, wherever the input still has one row a token.
        """
        current: list[Tensor | None] = [None]
        keep = self.keep if self.keep is not None and not len(self.keep) else None

        def rows(name: str, x: Tensor) -> None:
            if len(found := counted_rows(x, current[0])):
                on_input(name, found)

        sites = [self.sites[name] for name in names]
        modules = {work.name: work.owner for work in sites if work.site.swap == "module"}
        parameters = {work.name: work.parameter for work in sites if work.site.swap != "module"}
        with watch_inputs(modules, parameters, rows):
            for number, output in enumerate(self._outputs_with(current, self.calls if calls is None else calls)):
                self.tell(f"{number + 1} of {len(self.calls)} samples")
                if keep is not None:
                    keep.append(output)

    def _outputs_with(self, current: list[Tensor | None], calls: Iterable[Any]) -> Iterator[Any]:
        def masked() -> Iterator[Any]:
            for mask, call in zip(self.masks, calls, strict=True):
                current[0] = mask
                yield call

        return self.outputs(masked())

    @contextmanager
    def rounding_activations(self, also: Iterable[str] = ()) -> Iterator[None]:
        """Within, inputs of settled sites and of those in `also` are rounded as their scheme says, where the site is a
        module of its own."""
        others = set(also)
        with ExitStack() as undo:
            for work in self.sites.values():
                hook = rounding_hook(work) if work.canonical is not None or work.name in others else None
                if hook is not None:
                    undo.callback(work.owner.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield


def takes_change(site: Site, spec: LinearSpec) -> bool:
    """Whether the layer of a site can change its input: a module of its own, its weight its own and in integers."""
    return spec.weight.type == "int" and spec.weight.granularity in ("per_tensor", "per_channel", "per_group") and (
        site.swap == "module" and bool(site.owner) and not site.aliases and len(site.shape) == 2)


def counted_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """`x` [..., K] as float32 rows; those of masked tokens are left out, where `x` still has one row a token."""
    flat = x.detach().reshape(-1, x.shape[-1])
    if mask is not None and len(flat) == mask.numel():
        flat = flat[mask.reshape(-1).to(flat.device)]
    return flat.float()


def sites_of(model: nn.Module, decisions: Sequence[Decision]) -> dict[str, SiteWork]:
    """The sites of one block, by name, in the order given."""
    found = {}
    for decision in decisions:
        assert decision.spec is not None
        owner = model.get_submodule(decision.site.owner)
        found[decision.site.name] = SiteWork(site=decision.site, spec=decision.spec, owner=owner,
                                             parameter=model.get_parameter(decision.site.name))
    return found


def first_tensor(output: object) -> Tensor:
    """The first floating tensor of what a module gave, in order."""
    leaves = tree_leaves(output)
    held = leaves if any(isinstance(leaf, Tensor) for leaf in leaves) else list(vars(leaves[0]).values())
    return next(leaf for leaf in held if isinstance(leaf, Tensor) and leaf.is_floating_point())
