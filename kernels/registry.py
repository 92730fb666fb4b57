"""Registry: the one table of kernels, what each needs, and the choice among them with every refusal kept.

Two questions are asked apart: does this machine have what the kernel needs (`isa`), and can the kernel take these
arguments (`refuses`). Each answer is None or a sentence.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

from qpass.dtype import DType, dtype_name
from qpass.errors import DuplicateRegistration, NoKernel
from qpass.experts_spec import ExpertsSpec
from qpass.kernels.isa import machine_refuses
from qpass.kernels.layout import CANONICAL, Layout
from qpass.spec import LinearSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Call: TypeAlias = "LinearCall | ExpertsCall"
Refuses = Callable[[Any], "str | None"]
_Form = TypeVar("_Form", bound=Callable[..., Any])
Prepare = Callable[[], "str | None"]
NativeCall = Callable[[str, Sequence[Any]], "tuple[Callable[..., Any], tuple[Any, ...]] | None"]

_SIGNATURES = {
    "linear": ("x", "packed", "bias", "spec"),
    "linear_q": ("xq", "x_scale", "x_zero_point", "packed", "bias", "spec", "dtype"),
    "linear_list": ("x", "packed", "bias", "specs"),
    "linear_q_list": ("xq", "x_scale", "x_zero_point", "packed", "bias", "specs", "dtype"),
    "experts": ("x", "index", "weight", "packed", "bias", "spec"),
    "experts_q": ("xq", "x_scale", "x_zero_point", "index", "weight", "packed", "bias", "spec", "dtype"),
}


@dataclass(frozen=True, kw_only=True)
class _Where:
    """Device and dtype of the activations; as names too, so that asking what would run needs no torch. Whoever compares
    them compares `device_type` and `dtype_name`."""

    device: torch.device | str
    dtype: torch.dtype | DType

    @property
    def device_type(self) -> str:
        """`cpu`, `cuda`, ..."""
        return str(self.device).partition(":")[0]

    @property
    def dtype_name(self) -> DType:
        """`bfloat16`, `float32`, ..."""
        return dtype_name(self.dtype)


@dataclass(frozen=True, kw_only=True)
class LinearCall(_Where):
    """What is known of a call before it is made; sizes of the batch are not, kernels take any."""

    op: ClassVar[str] = "linear"
    spec: LinearSpec


@dataclass(frozen=True, kw_only=True)
class ExpertsCall(_Where):
    """The same of a layer of experts; `bias` says whether they have biases."""

    op: ClassVar[str] = "experts"
    spec: ExpertsSpec
    bias: bool = False

    def parts(self) -> list[LinearCall]:
        """The calls of its quantized weights, one expert each."""
        return [LinearCall(spec=part, device=self.device, dtype=self.dtype)
                for part in self.spec.parts if part is not None]


@dataclass(kw_only=True, eq=False)
class Kernel:
    """One kernel of the table. Call `forms[op]` to run it.

    `native_call(op, args)` says what a graph should call in place of a node of `qpass::<op>`: `args` are that node's
    arguments, in the schema's order, tensors standing as fx nodes or as real tensors alike (it looks only at the
    specs, dtypes and the shapes of lists). It returns (op overload, arguments), which gives the same result, or None
    if the `qpass` op should stay. It may compile the kernel, and then raises NoKernel if that fails.

        call = chosen.native_call and chosen.native_call("linear_q", node.args)
        if call is not None:
            node.target, node.args = call

    `prepare()` makes the kernel ready to run (compiles it, once a process) and returns None or why that failed.

    `op` is "linear" or "experts". `linear`, of a kernel of experts, names the linear kernel whose layout each expert's
    blocks have; None if it takes any.
    """

    name: str
    scheme: str | tuple[str, ...]
    device: str
    isa: str | None
    layout: Layout
    refuses: Refuses
    priority: int
    forms: dict[str, Callable[..., Any]] = field(default_factory=dict)
    native_call: NativeCall | None = None
    prepare: Prepare | None = None
    op: str = "linear"
    linear: str | None = None

    def form(self, op: str) -> Callable[[_Form], _Form]:
        """Decorator: the same kernel for `linear_q`, `linear_list`, `linear_q_list` or `experts_q`; the signature is
        checked."""

        def attach(fn: _Form) -> _Form:
            _check_signature(self.name, op, fn)
            if not op.startswith(self.op):
                raise TypeError(f"kernel {self.name!r} is for op {self.op!r} and cannot have a form {op!r}")
            if op in self.forms:
                raise DuplicateRegistration(f"kernel {self.name!r} has a form for {op} already")
            self.forms[op] = fn
            return fn

        return attach

    def serves(self, family: str) -> bool:
        """Whether it is a kernel for schemes of this family."""
        return self.scheme in ("*", family) or (isinstance(self.scheme, tuple) and family in self.scheme)

    def why_not(self, call: Call) -> str | None:
        """The first reason not to run `call`, or None."""
        spec = call.spec
        if self.op != call.op:
            return f"computes {self.op}, not {call.op}"
        if not self.serves(spec.family):
            which = self.scheme if isinstance(self.scheme, str) else f"{len(self.scheme)} other families"
            return f"computes {which}, not {spec.family}"
        if self.device not in ("*", call.device_type):
            return f"runs on {self.device}, not {call.device_type}"
        return machine_refuses(self.isa) or self.takes(call)

    def takes(self, call: Call) -> str | None:
        """The first reason not to take these arguments, whatever the machine, or None."""
        for part in [call] if isinstance(call, LinearCall) else call.parts():
            activation = part.spec.activation
            if activation is None or activation.number != "int8" or (self.scheme == "*" and self.op == "linear"):
                continue
            if activation.static and "linear_q" not in self.forms:
                return "rounds activations itself, per token, and these have a static scale"
            if not activation.static and (activation.granularity, activation.dynamic) != ("per_token", True):
                return f"rounds activations per token, not {activation.granularity.replace('_', ' ')}"
        return self.refuses(call)

    def __reduce__(self) -> Any:
        return kernel, (self.name,)

    def __deepcopy__(self, memo: Any) -> Kernel:
        return self


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The kernel chosen for a call, and why every better one was not."""

    kernel: Kernel
    refusals: dict[str, str]


KERNELS: dict[str, Kernel] = {}
_BUILTIN = (
    ("linear", "*", "reference.linear"), ("linear", "cpu", "cpu.x86"), ("linear", "cpu", "cpu.x86_decoded"),
    ("linear", "cpu", "cpu.x86_rounded"), ("linear", "cuda", "cuda.linear"), ("linear", "cuda", "cuda.torch_products"),
    ("experts", "*", "reference.experts"), ("experts", "*", "experts_loop"), ("experts", "cpu", "cpu.x86_experts"),
    ("experts", "cuda", "cuda.experts"),
)
_forced: list[str] = []


def register_kernel(*, scheme: str | tuple[str, ...], device: str, op: str = "linear", isa: str | None = None,
                    name: str | None = None, layout: Layout = CANONICAL, refuses: Refuses | None = None,
                    priority: int = 50, prepare: Prepare | None = None, native_call: NativeCall | None = None,
                    linear: str | None = None
                    ) -> Callable[[Callable[..., Tensor]], Kernel]:
    """Decorator that puts a kernel in the table and returns its Kernel, to which other forms can be attached.

    op        "linear" or "experts"
    scheme    a family such as "w4a8", several of them, or "*"
    device    a torch device type, or "*"
    isa       what the machine must have: "amx_int8", "avx512_vnni", "avx2", "x86_64", ...; None for anything
    refuses   LinearCall (ExpertsCall for op "experts") -> None or the sentence that says why not
    priority  higher is asked first; the native kernels have 10 to 40, the reference 0
    prepare, native_call, linear  see Kernel

    Raises DuplicateRegistration for a name in use, TypeError for a signature that is not the op's.
    """

    def put(fn: Callable[..., Tensor]) -> Kernel:
        if op not in ("linear", "experts"):
            raise TypeError("kernels are registered for op 'linear' or 'experts' and get other forms with .form(...); "
                            f"got {op!r}")
        label = name or fn.__name__
        if label in KERNELS:
            raise DuplicateRegistration(f"a kernel named {label!r} is registered already; choose another name")
        _check_signature(label, op, fn)
        made = Kernel(name=label, scheme=scheme, device=device, isa=isa, layout=layout, priority=priority,
                      refuses=refuses or (lambda call: None), forms={op: fn}, prepare=prepare,
                      native_call=native_call, op=op, linear=linear)
        KERNELS[label] = made
        return made

    return put


def kernel(name: str) -> Kernel:
    """The registered kernel of this name; loads the built-in ones if need be."""
    if name not in KERNELS:
        load_builtin()
    try:
        return KERNELS[name]
    except KeyError:
        raise NoKernel(f"no kernel is named {name!r}; registered: {', '.join(sorted(KERNELS))}") from None


def choose(call: Call, *, where: str = "", prepare: bool = False) -> Choice:
    """The best kernel that takes `call`. Raises NoKernel, naming `where`, if a forced kernel refuses.

    With `prepare` the kernel is also made ready, which may compile it; one that cannot be made ready refuses with
    the reason. Planning leaves it out, swapping sets it before weights are packed.
    """
    load_builtin(call)
    forced = _forced[-1] if _forced else os.environ.get("QPASS_KERNEL")
    wanted = kernel(forced) if forced else None
    if wanted is not None and wanted.op == call.op:
        if (why := _why_not(wanted, call, prepare)) is not None:
            raise NoKernel(f"kernel {forced!r} was forced but refuses {where or 'a layer'} ({call.spec}): {why}\n"
                           "choose another kernel, or add the layer to ignore")
        return Choice(kernel=wanted, refusals={})
    refusals: dict[str, str] = {}
    for candidate in sorted(KERNELS.values(), key=lambda k: -k.priority):
        if candidate.op != call.op:
            continue
        why = _why_not(candidate, call, prepare)
        if why is None and wanted is not None and candidate.linear not in (None, wanted.name):
            why = f"runs on weights packed for {candidate.linear}, and {wanted.name} was forced"
        if why is None:
            return Choice(kernel=candidate, refusals=refusals)
        if candidate.serves(call.spec.family) and candidate.device in ("*", call.device_type):
            refusals[candidate.name] = why
    raise NoKernel(f"no kernel for {call.spec} at {where or 'a layer'} on {call.device}:\n"
                   + "\n".join(f"  {name}: {why}" for name, why in refusals.items()))


@contextlib.contextmanager
def force_kernel(name: str) -> Iterator[None]:
    """Use this kernel for every layer planned or quantized inside the block; its refusal becomes an error."""
    kernel(name)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def load_builtin(call: Call | None = None) -> None:
    """Import the kernels that come with qpass, of all of them those that `call` is a question for; compiles nothing."""
    for op, device, module in _BUILTIN:
        if call is None or (op == call.op and device in ("*", call.device_type)):
            import_module(f"qpass.kernels.{module}")


def _why_not(candidate: Kernel, call: Call, prepare: bool) -> str | None:
    why = candidate.why_not(call)
    return candidate.prepare() if why is None and prepare and candidate.prepare is not None else why


def _check_signature(name: str, op: str, fn: Callable[..., Any]) -> None:
    want, got = _SIGNATURES[op], tuple(inspect.signature(fn).parameters)
    if got != want:
        raise TypeError(f"kernel {name!r} must take {want} as op {op!r} does, but takes {got}")
