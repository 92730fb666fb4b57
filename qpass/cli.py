"""Command line: arguments in, text and an exit code out; 0 is success, 1 an error that is said, 2 a wrong command."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from qpass import __version__
from qpass.errors import QPassError
from qpass.import_when_used import import_when_used

_AsWritten = argparse.RawDescriptionHelpFormatter
_WITHOUT_TORCH = ("inspect",)
_EXAMPLES = """examples:
  qpass demo                                               watch a small language model become W4A8 and answer
  qpass plan ./Llama-3.2-1B --recipe w4a8                  what would be done, from config.json alone
  qpass quantize ./Llama-3.2-1B ./llama-w4a8 --recipe w4a8 --override '*.down_proj=w8a8'
  qpass explain ./llama-w4a8                               what was done, layer by layer
  qpass eval ./llama-w4a8 --text book.txt --reference ./Llama-3.2-1B
  qpass bench ./Llama-3.2-1B                               which recipe to use on this machine, measured
  qpass inspect ./llama-awq                                what a checkpoint is, reading no weights
  qpass convert ./llama-awq ./llama-ct --to compressed-tensors
  qpass kernels                                            what runs on this machine, and why the rest does not

SRC is a Hugging Face model folder: config.json, safetensors, tokenizer. QPASS_DEBUG=1, 2 or 3 shows more.
"""
_RECIPE_HELP = ("a preset (w4a8, w8a8, w4a16, w8a16, w4a16_asym, w4a8_channel, ...) or a YAML or JSON recipe "
                "(default: w4a8)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; argparse itself exits with 2 for a command that it cannot read."""
    show_all = bool(os.environ.get("QPASS_DEBUG"))
    try:
        options, unknown = build_parser().parse_known_args(arguments)
        if unknown:
            options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        show_all = show_all or options.traceback
        if arguments is None and options.command in _WITHOUT_TORCH:  # as the process's own command, after which it ends
            import_when_used("torch", "numpy")
        from qpass import cli_commands  # here, for importing torch is when most people press Ctrl-C

        with cli_commands.quiet(enabled=not show_all):
            getattr(cli_commands, f"run_{options.command}")(options)
        if sys.stdout is not None:  # closed by `>&-`
            sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if show_all:
            traceback.print_exc()
        if _of_interrupt(error):
            print("interrupted", file=sys.stderr)
            return 130
        known = isinstance(error, (QPassError, OSError))
        print(f"error: {error if known else f'{type(error).__name__}: {error}'}", file=sys.stderr)
        if not known and not show_all:
            print("this error was not expected; --traceback shows where it comes from", file=sys.stderr)
        return 1


def _of_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind it: importing a package in C makes an error of its own of whatever stops it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `command`, its `parser` and `traceback` are set on every result."""
    parser = argparse.ArgumentParser(prog="qpass", epilog=_EXAMPLES, formatter_class=_AsWritten,
                                     description="Quantize language models, and see what was done to them.")
    parser.add_argument("--version", action="version", version=f"qpass {__version__}")
    every = argparse.ArgumentParser(add_help=False)
    every.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")

    def command(name: str, text: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", parents=[every],
                                   epilog=f"example:\n  {example}", formatter_class=_AsWritten)
        made.set_defaults(parser=made)  # whose usage an error shows
        return made

    quantize = command("quantize", "quantize the model in SRC and save it in DST",
                       "qpass quantize ./model ./model-w4a8 --recipe w4a8 --ignore lm_head '*.o_proj'")
    _source(quantize)
    quantize.add_argument("destination", metavar="DST", help="folder to write; must not exist or be empty")
    _recipe(quantize)
    quantize.add_argument("--overwrite", action="store_true", help="replace what is in DST")

    plan = command("plan", "say what quantize would do, reading config.json and no weights",
                   "qpass plan ./model --recipe w8a8 --full")
    _source(plan)
    _recipe(plan)
    _table(plan)

    explain = command("explain", "say what was done to a quantized model, layer by layer", "qpass explain ./model-w4a8")
    _source(explain)
    _table(explain)

    inspect = command("inspect", "say what a checkpoint is: format, bits, layers, size, and what would run here",
                      "qpass inspect ./model-gptq")
    inspect.add_argument("source", metavar="SRC", help="checkpoint folder or file, of any format that qpass reads")

    convert = command("convert", "write a quantized checkpoint in another format, the same integers",
                      "qpass convert ./model-awq ./model-ct --to compressed-tensors")
    convert.add_argument("source", metavar="SRC", help="checkpoint folder or file, of any format that qpass reads")
    convert.add_argument("destination", metavar="DST", help="folder to write; must not exist or be empty")
    convert.add_argument("--to", required=True, metavar="FORMAT",
                         help="compressed-tensors, gptq, gptq_v2, awq, modelopt, bitsandbytes or gguf")

    evaluate = command("eval", "perplexity on a text; with --reference also KL and top-1 agreement",
                       "qpass eval ./model-w4a8 --text book.txt --reference ./model --tokens 16384")
    _source(evaluate)
    evaluate.add_argument("--text", metavar="FILE", required=True, help="a text file in UTF-8")
    evaluate.add_argument("--reference", metavar="SRC", help="folder of the model to compare with, often the float one")
    evaluate.add_argument("--window", type=_positive, default=512, metavar="N",
                          help="tokens the model sees at once (default: 512)")
    evaluate.add_argument("--stride", type=_positive, metavar="N", help="new tokens a window scores (default: window)")
    evaluate.add_argument("--tokens", type=_positive, metavar="N", help="score at least this many (default: all)")

    bench = command("bench", "measure speed, memory and accuracy of recipes on this machine, and say which to use",
                    "qpass bench ./model --recipe w4a8 w8a8 --kl-limit 0.05")
    _source(bench)
    bench.add_argument("--recipe", nargs="+", action="extend", metavar="RECIPE",
                       help="presets, or YAML or JSON recipes (default: each preset that has kernels here)")
    bench.add_argument("--text", metavar="FILE", help="text for the accuracy (default: a chapter of a novel)")
    bench.add_argument("--tokens", type=_positive, default=1024, metavar="N",
                       help="score at least this many tokens of it (default: %(default)s)")
    bench.add_argument("--prompt", type=_positive, default=128, metavar="N", help="tokens read (default: %(default)s)")
    bench.add_argument("--new", type=_at_least_3, default=32, metavar="N", help="tokens made (default: %(default)s)")
    bench.add_argument("--batch", type=_positive, default=1, metavar="N", help="sequences at once (default: 1)")
    bench.add_argument("--eager", action="store_true", help="without torch.compile")
    bench.add_argument("--kl-limit", type=float, default=0.1, metavar="KL",
                       help="nats a token from the float model that are acceptable (default: %(default)s)")
    bench.add_argument("--json", action="store_true", help="print JSON")

    command("kernels", "list the kernels, what each computes, and why some do not run here", "qpass kernels")

    demo = command("demo", "get a small language model, quantize it, compile it, and let it answer",
                   "qpass demo --recipe w8a8 --prompt 'Why is the sky blue?'")
    demo.add_argument("--recipe", default="w4a8", help=_RECIPE_HELP)
    demo.add_argument("--prompt", default="What is the capital of France?", help="what to ask (default: %(default)s)")
    demo.add_argument("--cache-dir", metavar="DIR", help="where the model is kept (default: $QPASS_CACHE_DIR, or qpass "
                                                         "in the user's cache folder)")
    demo.add_argument("--tokens", type=_positive, default=1024, metavar="N",
                      help="tokens of text on which both models are evaluated (default: %(default)s)")
    demo.add_argument("--moe", action="store_true", help="take the model's copy as a mixture of experts: the same "
                                                         "function with fused expert weights")
    return parser


def _source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="Hugging Face model folder")


def _recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", default="w4a8", help=_RECIPE_HELP)
    parser.add_argument("--ignore", nargs="+", action="extend", metavar="TARGET",
                        help="layers that stay float, in place of the recipe's own list (for presets: lm_head); names, "
                             "globs, re:REGEX, class names or kinds")
    parser.add_argument("--override", action="append", default=[], type=_override, metavar="TARGET=SCHEME",
                        help="another scheme for some layers, or `float`; may be given several times")
    parser.add_argument("--strict", action="store_true", help="refuse any layer that stays float without being ignored")


def _table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help="a line for every layer")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", metavar="FILE", help="write a page as well")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def _at_least_3(text: str) -> int:
    value = int(text)
    if value < 3:
        raise argparse.ArgumentTypeError(f"must be at least 3, or there is nothing to time, got {value}")
    return value


def _override(text: str) -> tuple[str, str | None]:
    target, equals, scheme = text.rpartition("=")
    if not equals or not target or not scheme:
        raise argparse.ArgumentTypeError(f"must read TARGET=SCHEME, such as '*.down_proj=w8a8'; got {text!r}")
    return target, None if scheme.lower() in ("float", "none") else scheme
