"""The command line: what each command prints and writes, exit codes, and errors without a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import qpass
from qpass.cli import build_parser, main


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Any) -> Path:
    """A model folder with a tokenizer of letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path / "model"
    tiny_llama(dtype=torch.bfloat16).save_pretrained(path)
    letters = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?").save_pretrained(path)
    return path


def test_quantize_explain_and_eval(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "quantized"
    assert main(["quantize", str(folder), str(target), "--recipe", "w8a8", "--override", "*.down_proj=float"]) == 0
    said = capsys.readouterr()
    assert "12 quantized" in said.out and f"saved in {target}" in said.out and "100%" in said.err
    assert (target / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert main(["explain", str(target), "--html", str(tmp_path / "page.html")]) == 0
    said = capsys.readouterr()
    assert "self_attn.q_proj" in said.out and "w8a8" in said.out
    assert (tmp_path / "page.html").read_text().startswith("<!")
    text = tmp_path / "text.txt"
    text.write_text("It is a truth universally acknowledged. " * 5)
    assert main(["eval", str(target), "--text", str(text), "--reference", str(folder), "--window", "32"]) == 0
    said = capsys.readouterr()
    assert "199 in 7 windows of 32" in said.out and "KL(reference || model)" in said.out


def test_plan_reads_no_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.safetensors").unlink()
    assert main(["plan", str(folder), "--recipe", "w4a8", "--ignore", "lm_head", "*.o_proj", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["name"]: row["status"] for row in rows}["model.layers.0.self_attn.o_proj.weight"] == "keep"
    assert sum(row["status"] == "quantize" for row in rows) == 12
    assert main(["plan", str(folder), "--full"]) == 0
    assert "model.layers.1.mlp.up_proj.weight" in capsys.readouterr().out


def test_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels"]) == 0
    assert capsys.readouterr().out.strip() == str(qpass.support_matrix())


@pytest.mark.parametrize(("command", "says"), [
    (["plan", "/no/such/folder"], "/no/such/folder does not exist"),
    (["plan", "{model}", "--recipe", "w4a9"], "no scheme is named 'w4a9'"),
    (["plan", "{model}", "--override", "*.q_prj=w8a8"], "'*.q_prj' matches no layer"),
    (["plan", "{empty}"], "has no config.json"),
    (["explain", "{model}"], "is not quantized"),
    (["quantize", "{model}", "{model}"], "DST is SRC"),
    (["quantize", "{model}", "{empty}/.."], "is not empty"),
    (["eval", "{model}", "--text", "/no/such/text"], "there is no file /no/such/text"),
])
def test_errors_are_said_and_exit_with_1(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                         command: list[str], says: str) -> None:
    (tmp_path / "empty").mkdir()
    assert main([part.format(model=folder, empty=tmp_path / "empty") for part in command]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and says in said.err and "Traceback" not in said.err and said.out == ""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder in which nobody can make another")
@pytest.mark.parametrize("command", [["quantize", "{model}", "/proc/qpass"], ["quantize", "{model}", "{file}/out"],
                                     ["explain", "{model}", "--html", "/no/such/page.html"],
                                     ["plan", "{model}", "--html", "{model}"]])
def test_what_cannot_be_written_is_said_before_any_work(
        folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
        command: list[str]) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("worked before it asked whether the result can be kept")

    for name in ("load_float", "load_meta", "is_quantized"):
        monkeypatch.setattr(f"qpass.cli_commands.{name}", never if name != "is_quantized" else lambda source: False)
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert main([part.format(model=folder, file=tmp_path / "file") for part in command]) == 1
    said = capsys.readouterr().err
    assert ("cannot save to " if command[0] == "quantize" else "cannot be written") in said and said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_convert_asks_first_whether_it_can_write(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                                 ) -> None:
    (tmp_path / "file").write_text("")
    for to in ("awq", "gguf"):
        assert main(["convert", str(folder), str(tmp_path / "file" / "out.gguf"), "--to", to]) == 1
        assert "cannot save to " in capsys.readouterr().err


@pytest.mark.parametrize("wrapped", [False, True], ids=["as-it-is", "in-an-error-of-the-package"])
def test_interrupted_while_importing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
                                     wrapped: bool) -> None:
    class Interrupted:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "qpass.cli_commands":
                try:
                    raise KeyboardInterrupt
                except KeyboardInterrupt as stop:
                    if wrapped:
                        raise ImportError("initialization failed") from stop
                    raise

    monkeypatch.delitem(sys.modules, "qpass.cli_commands", raising=False)
    monkeypatch.delattr(qpass, "cli_commands", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    assert main(["kernels"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_stdout_closed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["kernels"]) == 0
    assert capsys.readouterr().err == ""


def test_a_damaged_model_is_an_error(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["quantize", str(folder), str(tmp_path / "quantized")]) == 1
    assert "error: " in capsys.readouterr().err and not (tmp_path / "quantized").exists()
    (folder / "config.json").write_text("{")
    assert main(["plan", str(folder)]) == 1
    assert "config.json is not JSON" in capsys.readouterr().err


def test_a_traceback_when_asked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["plan", "/no/such/folder", "--traceback"]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("QPASS_DEBUG", "1")
    assert main(["plan", "/no/such/folder"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["frobnicate"], ["plan"], ["eval", "x"], ["plan", "x", "--override", "w8a8"],
                                     ["eval", "x", "--text", "y", "--window", "0"]])
def test_wrong_commands_exit_with_2(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2 and "usage: qpass" in capsys.readouterr().err


def test_an_argument_too_many_shows_how_that_command_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "folder", "w4a8"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "usage: qpass plan" in said and "--recipe" in said and "unrecognized arguments: w4a8" in said


@pytest.mark.parametrize("command", ["quantize", "plan", "explain", "eval", "bench", "kernels", "demo"])
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        build_parser().parse_args([command, "--help"])
    assert stopped.value.code == 0 and f"example:\n  qpass {command}" in capsys.readouterr().out


def test_as_a_module_and_quietly() -> None:
    done = subprocess.run([sys.executable, "-m", "qpass", "kernels"], capture_output=True, text=True, check=False,
                          cwd="/", env=os.environ)
    assert done.returncode == 0 and "linear_reference" in done.stdout and done.stderr == ""
