"""Presets as they are written: the arguments that compressed-tensors has for the preset of that name."""

from __future__ import annotations

from typing import Any

import pytest

from qpass.formats.compressed_tensors_config import _activation_args
from qpass.formats.compressed_tensors_config_writer import _activations, _weights
from qpass.scheme import PRESETS

tool = pytest.importorskip("compressed_tensors.quantization")
schemes = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
THEIRS = {name.lower() for name in schemes.PRESET_SCHEMES}


def facts(args: Any) -> dict[str, Any] | None:
    """What stands in a file, without what only makes scales: who looks at the numbers before."""
    if args is None:
        return None
    said = args.model_dump(mode="json", exclude={"observer", "observer_kwargs"})
    return {**said, "group_size": said["group_size"] or None}


@pytest.mark.parametrize("name", sorted(THEIRS & set(PRESETS)))
def test_arguments_are_theirs(name: str) -> None:
    wanted, ours = tool.preset_name_to_scheme(name.upper(), ["Linear"]), PRESETS[name]
    assert facts(tool.QuantizationArgs(**_weights(ours.weight))) == facts(wanted.weights)
    written = None if ours.activation is None else _activations(ours.activation)
    assert facts(written and tool.QuantizationArgs(**written)) == facts(wanted.input_activations)
    assert (written and _activation_args(written, name)) == ours.activation
