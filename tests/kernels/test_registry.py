"""The registry: duplicates and wrong signatures are refused, the best kernel that can run is chosen, refusals kept."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch

from qpass.errors import DuplicateRegistration, NoKernel
from qpass.kernels import registry
from qpass.kernels.registry import KERNELS, LinearCall, choose, force_kernel, kernel, load_builtin, register_kernel
from qpass.scheme import preset
from qpass.spec import LinearSpec

load_builtin()


@pytest.fixture(autouse=True)
def own_table() -> Iterator[None]:
    before = dict(KERNELS)
    yield
    KERNELS.clear()
    KERNELS.update(before)


def call_of(scheme: str = "w4a8") -> LinearCall:
    s = preset(scheme)
    spec = LinearSpec(family=s.family, weight=s.weight, activation=s.activation, out_features=16, in_features=128)
    return LinearCall(spec=spec, device=torch.device("cpu"), dtype=torch.float32)


def add(name: str, priority: int = 99, **more):  # type: ignore[no-untyped-def]
    @register_kernel(name=name, scheme="w4a8", device="cpu", priority=priority, **more)
    def linear(x, packed, bias, spec):  # type: ignore[no-untyped-def]
        return x

    return linear


def test_the_best_priority_wins_and_the_refusals_of_better_ones_are_kept() -> None:
    add("best", 99, refuses=lambda call: "is on holiday")
    add("good", 98)
    add("never asked", 1, refuses=lambda call: pytest.fail("a worse kernel was asked"))
    choice = choose(call_of())
    assert choice.kernel.name == "good" and choice.refusals == {"best": "is on holiday"}


def test_refusals_name_only_kernels_of_the_family_and_device() -> None:
    add("picky", refuses=lambda call: "needs more")  # for w4a8
    assert choose(call_of()).refusals["picky"] == "needs more"
    other = choose(call_of("w3a8"))
    assert "picky" not in other.refusals
    assert all(KERNELS[name].serves("w3a8") and KERNELS[name].device in ("cpu", "*") for name in other.refusals)


def test_a_kernel_that_cannot_be_made_ready_refuses_only_when_asked_to_be() -> None:
    asked = []
    add("unready", prepare=lambda: asked.append(1) or "its compiler is broken")
    assert choose(call_of()).kernel.name == "unready" and asked == []
    choice = choose(call_of(), prepare=True)
    assert choice.kernel.name != "unready" and choice.refusals["unready"] == "its compiler is broken" and asked == [1]


def test_a_forced_kernel_is_used_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with force_kernel("linear_reference"):
        assert choose(call_of()).kernel.name == "linear_reference"
    add("picky", refuses=lambda call: "needs more")
    with force_kernel("picky"), pytest.raises(NoKernel, match=r"'picky' was forced but refuses layers\.3.*needs more"):
        choose(call_of(), where="layers.3")
    monkeypatch.setenv("QPASS_KERNEL", "linear_reference")
    assert choose(call_of()).kernel.name == "linear_reference"
    with force_kernel("picky"), pytest.raises(NoKernel):  # the block is nearer than the environment
        choose(call_of())


def test_a_forced_kernel_that_is_not_ready_is_an_error() -> None:
    add("unready", prepare=lambda: "its compiler is broken")
    with force_kernel("unready"), pytest.raises(NoKernel, match="its compiler is broken"):
        choose(call_of(), prepare=True)


def test_unknown_names_are_errors_that_list_the_known() -> None:
    with pytest.raises(NoKernel, match="linear_reference"):
        kernel("linear_w4a8_abacus")
    with pytest.raises(NoKernel), force_kernel("linear_w4a8_abacus"):
        pass


def test_names_are_taken_once() -> None:
    add("mine")
    with pytest.raises(DuplicateRegistration, match="mine"):
        add("mine")


def test_signatures_must_be_the_ops() -> None:
    with pytest.raises(TypeError, match="must take"):
        @register_kernel(name="bad", scheme="w4a8", device="cpu")
        def bad(x, weight):  # type: ignore[no-untyped-def]
            return x
    assert "bad" not in KERNELS
    made = add("mine")
    with pytest.raises(TypeError, match="linear_q"):
        made.form("linear_q")(lambda x, packed: x)
    with pytest.raises(TypeError, match="forms"):
        register_kernel(op="linear_q", scheme="w4a8", device="cpu")(lambda x, packed, bias, spec: x)


def test_a_form_is_attached_once() -> None:
    made = add("mine")

    def linear_list(x, packed, bias, specs):  # type: ignore[no-untyped-def]
        return [x]

    assert made.form("linear_list")(linear_list) is linear_list and made.forms["linear_list"] is linear_list
    with pytest.raises(DuplicateRegistration, match="linear_list"):
        made.form("linear_list")(linear_list)


def test_no_kernel_at_all_lists_every_reason() -> None:
    del KERNELS["linear_reference"]
    for name in [n for n, k in KERNELS.items() if k.scheme == "w4a8"]:
        del KERNELS[name]
    add("picky", refuses=lambda call: "needs more")
    with pytest.raises(NoKernel, match=r"layers\.3[\s\S]*picky: needs more"):
        choose(call_of(), where="layers.3")


def test_kernels_are_copied_and_pickled_by_name() -> None:
    one = registry.kernel("linear_reference")
    assert copy.deepcopy(one) is one and pickle.loads(pickle.dumps(one)) is one
