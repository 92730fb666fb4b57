"""Fixtures for every test: offline, quiet and seeded; small models of many shapes, built from a config."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# Before torch and transformers are imported. Compiled code is kept by source hash, so a cache that outlives the run
# is safe; it lies in the checkout, so that tests neither read nor fill the user's own.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
    OMP_WAIT_POLICY="PASSIVE",  # two workers with two threads each share two cores: waiting threads must not spin
)
for _variable, _folder in (("QPASS_CACHE_DIR", "qpass"), ("TORCHINDUCTOR_CACHE_DIR", "inductor")):
    os.environ.setdefault(_variable, str(ROOT / ".cache" / _folder))
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes beside pytest's own
for _variable in ("QPASS_DEBUG", "QPASS_KERNEL"):  # a user's settings; QPASS_ISA and QPASS_CHECK may stay on purpose
    os.environ.pop(_variable, None)

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

settings.register_profile("qpass", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("qpass")

# Two, even under pytest-xdist, so that what is split between threads is tested split.
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Every test starts from the same seeds and, if the compiler is loaded at all, from an empty one."""
    random.seed(0)
    # torch.manual_seed also notes, with a traceback each, what devices unused so far are to do later.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    yield


# family -> config class and the config fields of its own
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "tied_llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": False}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 128, "n_positions": 128}),
    "opt": ("OPTConfig", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeConfig", {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}),
}


def build_model(family: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0,
                **changes: Any) -> torch.nn.Module:
    """A Transformers model of `family`: 2 layers, hidden 64, intermediate 128, vocabulary 128, seeded random weights.

    `changes` are config fields. On device "meta" no weights are made.
    """
    import transformers

    config_class, own = FAMILIES[family]
    sizes: dict[str, Any] = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if family != "gpt2":
        sizes.update(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128)
    if family not in ("gpt2", "opt"):
        sizes.update(intermediate_size=128, num_key_value_heads=2)
    config = getattr(transformers, config_class)(**{**sizes, **own, **changes})
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        # dtype goes in here, not through .to(): rotary frequencies stay float32, as in a model loaded from disk.
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()  # type: ignore[no-any-return]


@pytest.fixture
def tiny_llama() -> Callable[..., torch.nn.Module]:
    """`tiny_llama(dtype=torch.float32, **config)`: a Llama of two layers; see build_model."""

    def build(dtype: torch.dtype = torch.float32, **changes: Any) -> torch.nn.Module:
        return build_model("llama", dtype=dtype, **changes)

    return build


@pytest.fixture
def tiny_model() -> Callable[..., torch.nn.Module]:
    """`tiny_model(family, dtype=torch.float32, **config)`: one of FAMILIES, two layers; see build_model."""
    return build_model


@pytest.fixture
def token_ids() -> torch.Tensor:
    """[2, 9] seeded token ids within the small models' vocabulary."""
    return torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))


def pytest_collection_finish() -> None:
    """What is loaded by now stays: the garbage collector need not go through it again, a tenth of all the time."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many expert parameters of each model family were found and quantized, also where workers ran the tests."""
    told = [text for report in terminalreporter.stats.get("passed", ()) for name, text in report.user_properties
            if name == "experts"]
    if told:
        terminalreporter.section("experts of model families")
        terminalreporter.write_line("\n".join(told))
