"""Bench measurements: what is timed is as many tokens as were asked for, and the model is left as it was."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from qpass.bench.measurements import generate_times


def test_no_token_ends_an_answer() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=32)).eval()
    every = list(range(32))
    model.generation_config.eos_token_id = every
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    first, later = generate_times(model, 4, 5, 2)
    assert len(forwards) == 5 and first > 0 and later > 0
    assert model.generation_config.eos_token_id == every
