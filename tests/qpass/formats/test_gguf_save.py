"""GGUF saving: what is written is read back equal, here and by Transformers; what cannot be written is said."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch

import qpass
from qpass.errors import CheckpointError
from qpass.formats.gguf_config import load_tokenizer
from qpass.formats.gguf_file import read_gguf

pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")


def small(kind: str = "Llama", **fields: Any) -> Any:
    config = getattr(transformers, kind + "Config")(**{
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 128, "tie_word_embeddings": False,
        **fields})
    return getattr(transformers, kind + "ForCausalLM")(config).eval()


def weights(model: Any) -> dict[str, torch.Tensor]:
    state = {name: p.detach() for name, p in model.named_parameters()}
    return state | {f"{path}.weight": layer.dequantize(torch.float32) for path, layer in model.named_modules()
                    if hasattr(layer, "canonical")}


@pytest.mark.parametrize(("scheme", "kind"), [
    ("w4a16", "Q4_0"), ("w3a16", "Q4_0"), ("w8a16", "Q8_0"), ("w6a16", "Q8_0"), ("w4a8", "Q4_0")])
def test_integers_come_back_equal(scheme: str, kind: str, tmp_path: Path) -> None:
    model = small().bfloat16()
    qpass.quantize(model, qpass.PRESETS[scheme].with_group_size(32), progress=False)
    path = qpass.save(model, tmp_path / "m.gguf", format="gguf")
    assert read_gguf(path).tensors["blk.0.attn_q.weight"].kind == kind
    loaded = qpass.load(path, dtype=torch.bfloat16)
    before, after = weights(model), weights(loaded)
    assert set(before) == set(after)
    for name, weight in before.items():
        assert torch.equal(weight.float(), after[name].float()), name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, before[name].float()), name


def test_zero_points_become_offsets(tmp_path: Path) -> None:
    model = small()
    qpass.quantize(model, qpass.PRESETS["w4a16_asym"].with_group_size(32), progress=False)
    path = qpass.save(model, tmp_path, format="gguf")
    assert path == tmp_path / "model.gguf" and read_gguf(path).tensors["blk.1.ffn_down.weight"].kind == "Q4_1"
    after = weights(qpass.load(path))
    for name, weight in weights(model).items():
        assert (weight - after[name]).abs().max() < 2e-3 * weight.abs().max(), name


def test_offsets_come_back_equal(tmp_path: Path) -> None:
    model = small()
    qpass.quantize(model, qpass.PRESETS["w4a16_asym"].with_group_size(32), progress=False)
    first = qpass.load(qpass.save(model, tmp_path / "a.gguf", format="gguf"))
    second = qpass.save(first, tmp_path / "b.gguf", format="gguf")
    assert read_gguf(second).tensors.keys() == read_gguf(tmp_path / "a.gguf").tensors.keys()
    after = weights(qpass.load(second))
    for name, weight in weights(first).items():
        assert torch.equal(weight, after[name]), name


def test_floats_and_tied_heads(tmp_path: Path) -> None:
    model = small("Qwen2", tie_word_embeddings=True)
    qpass.quantize(model, qpass.Recipe(qpass.PRESETS["w8a16"].with_group_size(32), ignore=["lm_head"]), progress=False)
    path = qpass.save(model, tmp_path / "m.gguf", format="gguf")
    assert "output.weight" not in read_gguf(path).tensors
    loaded = qpass.load(path)
    assert loaded.config.tie_word_embeddings and loaded.config.model_type == model.config.model_type
    ids = torch.arange(7)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, loaded(ids).logits, atol=1e-3)


def test_a_group_that_is_no_multiple_of_32_is_written_in_float(tmp_path: Path) -> None:
    model = small()
    qpass.quantize(model, qpass.PRESETS["w4a16"].with_group_size(16), progress=False)
    path = qpass.save(model, tmp_path / "m.gguf", format="gguf")
    assert read_gguf(path).tensors["blk.0.attn_v.weight"].kind == "F32"
    after = weights(qpass.load(path))
    for name, weight in weights(model).items():
        assert torch.equal(weight, after[name]), name


def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="only Transformers models"):
        qpass.save(torch.nn.Linear(4, 4), tmp_path / "m.gguf", format="gguf")
    with pytest.raises(CheckpointError, match="under the name 'exe'"):
        qpass.save(torch.nn.Linear(4, 4), tmp_path / "m", format="exe")
    model = small()
    qpass.quantize(model, qpass.PRESETS["w4a16"].with_group_size(32), progress=False)
    model.model.layers[0].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.extra"):
        qpass.save(model, tmp_path / "m.gguf", format="gguf")
    assert not list(tmp_path.iterdir())


def test_a_config_of_absurd_sizes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    from qpass.formats.gguf_write import GgufEntry, plain_bytes, write_gguf

    entry = GgufEntry(name="token_embd.weight", kind="F32", shape=(4, 4), make=lambda: plain_bytes(torch.ones(4, 4))[1])
    write_gguf(path, {"general.architecture": "llama", "llama.block_count": 10**9}, [entry])
    with pytest.raises(CheckpointError, match="block_count is 1000000000"):
        qpass.load(path)


def test_a_byte_level_vocabulary_is_written_and_read_back(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=290, special_tokens=["<s>", "</s>"], show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(["the cat sat on the mat, 12 times; the hat sat on the cat"] * 9, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    path = qpass.save(small(vocab_size=300), tmp_path / "m.gguf", format="gguf", tokenizer=tokenizer)
    file = read_gguf(path)
    start = path.read_bytes().index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type")
    assert path.read_bytes()[start:start + 8] == struct.pack("<II", 9, 5)  # an array of int32: llama.cpp takes no other
    types = file.metadata["tokenizer.ggml.token_type"]
    count = len(tokenizer)
    assert types[:2] == [3, 3] and set(types[2:count]) == {1} and set(types[count:]) == {5}
    assert file.metadata["tokenizer.ggml.pre"] == "smollm" and len(file.metadata["tokenizer.ggml.tokens"]) == 300
    read = load_tokenizer(path)
    text = "the hat, 34 times!"
    assert read(text)["input_ids"] == tokenizer(text)["input_ids"] and read.eos_token == "</s>"
    with pytest.raises(CheckpointError, match="and the model has 260 rows"):
        qpass.save(small(vocab_size=260), tmp_path / "n.gguf", format="gguf", tokenizer=tokenizer)
    assert not (tmp_path / "n.gguf").exists()
