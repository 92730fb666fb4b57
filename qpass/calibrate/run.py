"""Run: a model, its decisions, algorithms and data in; block by block, the integers found, handed over to be packed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn

from qpass.activation_scale import ActivationScale
from qpass.calibrate.activation_range import static_scales_of
from qpass.calibrate.activation_store import ActivationStore, Budget
from qpass.calibrate.block_work import BlockWork, sites_of
from qpass.calibrate.blocks import Block
from qpass.calibrate.experts import ExpertsWork, ExpertWeights, take_back, tensors_of
from qpass.calibrate.pairs import Pair
from qpass.calibrate.prefix import call_of, check_finite
from qpass.calibrate.samples import Sample
from qpass.calibrate.work_folder import WorkFolder, fingerprint_of
from qpass.capture.as_found import in_eval_mode
from qpass.decide.decision import Decision
from qpass.decide.match import matching
from qpass.experts_site import ExpertsSite
from qpass.input_change import InputChange
from qpass.recipes.algorithm_table import Algorithm
from qpass.weight import CanonicalWeight


class Install(Protocol):
    """Packs a site with what was found for it, and what its layer does to its input; or its whole module of experts
    with what was found for them."""

    def __call__(self, decision: Decision, canonical: CanonicalWeight | None, scale: ActivationScale | None = None,
                 experts: ExpertWeights | None = None, change: InputChange | None = None) -> None: ...


class Bar(Protocol):
    """The part of tqdm's progress bar that is used here."""

    def set_postfix_str(self, text: str, refresh: bool = True) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How a calibration may use the machine.

    work_folder   keeps what was done, so that the same call goes on after an interruption; None keeps nothing
    memory_limit  bytes of activations in memory, beyond which they lie in files; None sets no limit
    seed          of whatever an algorithm draws at random
    """

    work_folder: Path | None = None
    memory_limit: int | None = None
    seed: int = 0


def aimed_at(algorithms: Sequence[Algorithm], decisions: Sequence[Decision]) -> dict[Algorithm, frozenset[str]]:
    """Algorithm -> names of the sites that it works on. Raises UnmatchedRule for a target that matches no site."""
    sites = [decision.site for decision in decisions]
    quantized = frozenset(d.site.name for d in decisions if d.status == "quantize")
    return {algorithm: quantized & matching(algorithm.targets, sites) if algorithm.targets else quantized
            for algorithm in algorithms}


def without_data(model: nn.Module, decisions: Sequence[Decision], aimed: Mapping[Algorithm, frozenset[str]],
                 install: Install, mixed: Mapping[str, int] = MappingProxyType({})) -> list[str]:
    """Run algorithms that need no data, one site after another; sites in `mixed` mix their inputs in blocks of so many
    channels. Returns notes for the report."""
    notes: list[str] = []
    for decision in decisions:
        block = Block(path=decision.site.owner, sites=(decision.site.name,), last_reader=0)
        work = BlockWork(block=block, module=model, sites=sites_of(model, [decision]), masks=(), notes=notes,
                         calls=ActivationStore(Budget(None, Path())), aimed=aimed)
        with own_tensors(model.get_submodule(decision.site.owner), recurse=False), ExitStack() as undo:
            undo.callback(work.take_off_hooks)
            work.mix_inputs(mixed)
            for algorithm in aimed:
                import_module(algorithm.wiring).calibrate(algorithm, work)
            if decision.site.name in mixed:
                work.round_the_rest()
        site = work.sites[decision.site.name]
        install(decision, site.canonical, None, change=site.change)
    return notes


class Calibration:
    """One run over a model's blocks."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block], decisions: Sequence[Decision],
                 aimed: Mapping[Algorithm, frozenset[str]], samples: Sequence[Sample], limits: Limits,
                 pairs: Sequence[Pair] = (), experts: Mapping[ExpertsSite, Sequence[Decision]] | None = None,
                 mixed: Mapping[str, int] = MappingProxyType({})) -> None:
        """`experts`: the decisions of all weights of each module of experts. `mixed`: sites that mix their inputs, in
        blocks of so many channels, which nothing before them can scale then."""
        self.pairs = [pair for pair in pairs if not any(name in mixed for name, _ in pair.readers)]
        self.experts, self.mixed = experts or {}, mixed
        self.model, self.blocks, self.aimed, self.samples, self.limits = model, blocks, aimed, samples, limits
        self.decisions = {decision.site.name: decision for decision in decisions}
        self.propagate = any(algorithm.propagates for algorithm in aimed)
        self.matches = any(algorithm.matches_float for algorithm in aimed)
        self.notes: list[str] = []

    def run(self, install: Install, bar: Bar) -> list[str]:
        """Calibrate every block in order and hand each of its sites to `install`; returns notes for the report.

        Memory: the model, one block in float32, one block's activations, and what the algorithm holds of one block.
        After an exception the block at hand is float and as it was.
        """
        with tempfile.TemporaryDirectory(prefix="qpass-activations-") as scratch, in_eval_mode(self.model), (
                torch.no_grad()):
            folder = self.limits.work_folder
            budget = Budget(self.limits.memory_limit, Path(scratch) if folder is None else folder / "activations")
            kept = None if folder is None else WorkFolder(folder, self._fingerprint())
            outputs: dict[int, ActivationStore] = {}
            exact: dict[int, ActivationStore] = {}
            for number, block in enumerate(self.blocks):
                place = f"{block.path or 'the model'} ({number + 1} of {len(self.blocks)})"
                bar.set_postfix_str(f"{place}: inputs")
                with own_tensors(self.model.get_submodule(block.path)) as originals, ExitStack() as undo:
                    work = self._work(number, budget, outputs, _teller(bar, place))
                    undo.callback(work.take_off_hooks)
                    if self.matches:
                        work.float_calls, work.targets = ActivationStore(budget), ActivationStore(budget)
                        self._float_calls(number, work.float_calls, exact)
                        exact[number] = work.targets
                    work.mix_inputs(self.mixed)
                    for stores in (outputs, exact):
                        for earlier in [n for n in stores if n < number and self.blocks[n].last_reader <= number]:
                            stores.pop(earlier).clear()
                    following = ActivationStore(budget)
                    self._calibrate(number, work, kept, originals, None if self.propagate else following)
                    scales = static_scales_of(work)
                    if number + 1 < len(self.blocks):
                        if not len(following):
                            work.tell("outputs")
                            for output in work.outputs():
                                following.append(output)
                        outputs[number] = following
                    work.forget_kept()
                    work.calls.clear()
                    if work.float_calls is not None:
                        work.float_calls.clear()
                self.notes += work.notes
                for name in block.sites:
                    site = work.sites[name]
                    install(self.decisions[name], site.canonical, scales.get(name), change=site.change)
                for one in work.experts:
                    for decision in one.decisions if one.found else ():
                        if decision.status == "quantize":
                            install(decision, None, experts=one.found)
            for stores in (outputs, exact):
                for store in stores.values():
                    store.clear()
            with suppress(OSError):
                budget.folder.rmdir()
        return self.notes

    def _work(self, number: int, budget: Budget, outputs: Mapping[int, ActivationStore],
              tell: Callable[[str], None]) -> BlockWork:
        block, calls = self.blocks[number], ActivationStore(budget)
        for index, sample in enumerate(self.samples):
            call = call_of(self.model, self.blocks, number, sample, {n: store[index] for n, store in outputs.items()})
            check_finite(call, block.path, index)
            calls.append(call)
        sites = sites_of(self.model, [self.decisions[name] for name in block.sites])
        start = f"{block.path}." if block.path else ""
        pairs = [pair for pair in self.pairs if all(name.startswith(start) for name in pair.parameters)]
        module = self.model.get_submodule(block.path)
        experts = [ExpertsWork(site=site, owner=self.model.get_submodule(site.owner), decisions=decisions)
                   for site, decisions in self.experts.items() if f"{site.owner}.".startswith(start)]
        return BlockWork(block=block, pairs=pairs, experts=experts, module=module, sites=sites, calls=calls,
                         masks=[sample.mask for sample in self.samples], aimed=self.aimed, tell=tell,
                         seed=self.limits.seed + number)

    def _float_calls(self, number: int, calls: ActivationStore, exact: Mapping[int, ActivationStore]) -> None:
        """The block's arguments in the float model, given what earlier blocks gave in it."""
        for index, sample in enumerate(self.samples):
            calls.append(call_of(self.model, self.blocks, number, sample,
                                 {n: store[index] for n, store in exact.items()}))

    def _calibrate(self, number: int, work: BlockWork, kept: WorkFolder | None, originals: Mapping[str, Tensor],
                   float_outputs: ActivationStore | None) -> None:
        found = None if kept is None else kept.load(number)
        if found is not None:
            work.fill_targets()
            if float_outputs is not None:
                for output in work.outputs():
                    float_outputs.append(output)
            _restore(work, found)
            return
        work.keep = float_outputs
        for algorithm in self.aimed:
            work.forget_kept()  # of the algorithm before
            if algorithm.needs_targets:
                work.fill_targets()
            import_module(algorithm.wiring).calibrate(algorithm, work)
        work.keep = None
        left = work.round_the_rest()
        if left:
            work.forget_kept()
        if left and any(algorithm.rounds for algorithm in self.aimed):
            work.notes.append(f"rounded to nearest without data: {', '.join(left)}")
        if kept is not None:
            kept.save(number, _result(work, originals))

    def _fingerprint(self) -> str:
        said = json.dumps([[a.to_data() for a in self.aimed], self.limits.seed,
                           [f"{name} {d.spec}" for name, d in self.decisions.items()], dict(self.mixed)])
        return fingerprint_of(self.model, self.samples, said)


def _teller(bar: Bar, place: str) -> Callable[[str], None]:
    return lambda text: bar.set_postfix_str(f"{place}: {text}", refresh=False)


@contextmanager
def own_tensors(module: nn.Module, recurse: bool = True) -> Iterator[dict[str, Tensor]]:
    """Within, the module's parameters and buffers are float32, and may be replaced (`.data = `) but not written into.

    Yields name -> tensor as it was. Afterwards they have their dtype again; after an exception also their numbers.
    """
    held = {name: tensor for name, tensor in (*module.named_parameters(recurse=recurse),
                                              *module.named_buffers(recurse=recurse)) if tensor.is_floating_point()}
    originals = {name: tensor.data for name, tensor in held.items()}
    widened = {name: data.float() if data.dtype.itemsize < 4 else data for name, data in originals.items()}
    try:
        for name, tensor in held.items():
            tensor.data = widened[name]
        yield originals
        for name, tensor in held.items():
            same = tensor.data.data_ptr() == widened[name].data_ptr()
            tensor.data = originals[name] if same else tensor.data.to(originals[name].dtype)
    except BaseException:
        for name, tensor in held.items():
            tensor.data = originals[name]
        raise


def _result(work: BlockWork, originals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Integers of every settled site, and every other parameter of the block that an algorithm has changed."""
    found = {}
    settled = set()
    for name, site in work.sites.items():
        if site.change.scale is not None:
            found[f"input|{name}"] = site.change.scale
        if site.canonical is not None:
            settled.add(id(site.parameter))
            found.update({f"site|{name}|{key}": tensor for key, tensor in site.canonical.tensors.items()})
    found.update(tensors_of(work.experts))
    settled |= {id(parameter) for one in work.experts if one.found for parameter in one.owner.parameters(False)}
    for name, parameter in work.module.named_parameters():
        before = originals.get(name)
        if before is not None and id(parameter) not in settled and not torch.equal(before.float(), parameter.float()):
            found[f"parameter|{name}"] = parameter.data
    return found


def _restore(work: BlockWork, found: Mapping[str, Tensor]) -> None:
    """Put back what `_result` kept."""
    for name, site in work.sites.items():
        prefix = f"site|{name}|"
        tensors = {key.removeprefix(prefix): tensor.to(site.parameter.device) for key, tensor in found.items()
                   if key.startswith(prefix)}
        if tensors:
            site.settle(CanonicalWeight(tensors))
        if f"input|{name}" in found:
            work.change_input(site, replace(site.change, scale=found[f"input|{name}"].to(site.parameter.device)))
    take_back(work.experts, found)
    for name, parameter in work.module.named_parameters():
        if f"parameter|{name}" in found:
            parameter.data = found[f"parameter|{name}"].to(parameter.device)
