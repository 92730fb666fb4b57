"""Commands: what each command of the command line does with its parsed arguments, printed to stdout."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import qpass
from qpass.checkpoints.model_folder import TokenizerFiles, check_folder, is_quantized, load_float, load_meta
from qpass.checkpoints.publish_folder import check_target
from qpass.errors import CheckpointError, QPassError

_CHATTY = ("torchao", "transformers", "torch.utils._pytree", "torch.distributed", "torch._inductor", "torch._dynamo",
           "torch._export", "torch.export", "accelerate")


@contextlib.contextmanager
def quiet(*, enabled: bool) -> Iterator[None]:
    """Keep the chatter of the libraries below off the terminal; errors still come through."""
    if not enabled:
        yield
        return
    import torch  # noqa: F401  (it sets up its own logging when imported, which must come first)

    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    before = {name: logging.getLogger(name).level for name in _CHATTY}
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def run_quantize(options: argparse.Namespace) -> None:
    """Load, quantize with a progress bar, save, and print the report."""
    source, destination = check_folder(options.source), Path(options.destination)
    recipe = recipe_of(options)
    if destination.resolve() == source.resolve():
        raise CheckpointError(f"DST is SRC, {source}; choose another folder, the float model is not overwritten")
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination} is a file; choose another folder")
    if destination.is_dir() and any(destination.iterdir()) and not options.overwrite:
        raise CheckpointError(f"{destination} is not empty; choose another folder, or --overwrite")
    if is_quantized(source):
        raise CheckpointError(f"the model in {source} is quantized already; give the float model, or see what was done "
                              f"to it: qpass explain {source}")
    check_target(destination)
    model = qpass.quantize(load_float(source), recipe)
    tokenizer = TokenizerFiles(source)
    qpass.save(model, destination, tokenizer=tokenizer)
    print(qpass.explain(model))
    print(f"\nsaved in {destination}" + ("" if tokenizer.paths else f" (no tokenizer in {source})"))


def run_plan(options: argparse.Namespace) -> None:
    """Print the dry run, made on the meta device."""
    source = _checked(options)
    _show(qpass.plan(load_meta(source), recipe_of(options)), options)


def run_explain(options: argparse.Namespace) -> None:
    """Load the quantized model and print its report."""
    source = _checked(options)
    if not is_quantized(source):
        raise CheckpointError(f"the model in {source} is not quantized; what could be done to it: qpass plan {source}")
    _show(qpass.explain(qpass.load(source)), options)


def run_inspect(options: argparse.Namespace) -> None:
    """Print what the checkpoint is."""
    print(qpass.inspect(options.source))


def run_convert(options: argparse.Namespace) -> None:
    """Load, save in the other format, and print what changed."""
    from qpass.convert_checkpoint import convert

    print(convert(options.source, options.destination, to=options.to))


def run_eval(options: argparse.Namespace) -> None:
    """Print perplexity, and the distance from the reference."""
    source, text = check_folder(options.source), Path(options.text)
    if not text.is_file():
        raise QPassError(f"there is no file {text}; --text takes a text file in UTF-8")
    reference = None if options.reference is None else check_folder(options.reference)
    print(qpass.evaluate(_load(source), text, None if reference is None else _load(reference), tokenizer=str(source),
                         window=options.window, stride=options.stride, tokens=options.tokens, progress=True))


def run_bench(options: argparse.Namespace) -> None:
    """Measure each recipe beside the float model, and print the table and what it speaks for."""
    from qpass.bench.bench_table import as_json, table
    from qpass.bench.run import TEXT, bench_model

    text = TEXT if options.text is None else Path(options.text)
    if not text.is_file():
        raise QPassError(f"there is no file {text}; --text takes a text file in UTF-8")
    found = bench_model(options.source, options.recipe, text=text, tokens=options.tokens, prompt=options.prompt,
                        new=options.new, batch=options.batch, compiled=not options.eager,
                        say=lambda said: print(said, file=sys.stderr, flush=True))
    print(as_json(found, kl_limit=options.kl_limit) if options.json else table(found, kl_limit=options.kl_limit))


def run_kernels(options: argparse.Namespace) -> None:
    """Print the support matrix."""
    print(qpass.support_matrix())


def run_demo(options: argparse.Namespace) -> None:
    """See qpass.demo.run."""
    from qpass.demo.run import run

    run(options.recipe, prompt=options.prompt, cache=options.cache_dir, tokens=options.tokens, moe=options.moe)


def recipe_of(options: argparse.Namespace) -> Any:
    """The recipe of --recipe, changed by --ignore, --override and --strict."""
    from qpass.recipes.recipe_files import as_recipe

    recipe = as_recipe(options.recipe)
    overrides = {rule.target: rule.scheme for rule in recipe.overrides} | dict(options.override)
    ignore = recipe.ignore if options.ignore is None else options.ignore
    return qpass.Recipe(recipe.scheme, ignore=ignore, overrides=overrides, algorithms=recipe.algorithms,
                        on_indivisible=recipe.on_indivisible, strict=options.strict or recipe.strict,
                        on_unsupported_activation=recipe.on_unsupported_activation)


def _load(folder: Path) -> Any:
    return qpass.load(folder) if is_quantized(folder) else load_float(folder)


def _checked(options: argparse.Namespace) -> Path:
    """The model folder, and a place for the page: asked before any work."""
    if options.html and (Path(options.html).is_dir() or not Path(options.html).absolute().parent.is_dir()):
        raise QPassError(f"--html: {options.html} cannot be written: it is a folder, or lies in one that is not there")
    return check_folder(options.source)


def _show(table: Any, options: argparse.Namespace) -> None:
    if options.html:
        table.to_html(options.html)
    print(table.to_json() if options.json else table.table(full=options.full))
