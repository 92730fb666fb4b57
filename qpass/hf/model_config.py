"""Transformers: what a quantized model tells its config, and how a folder's config becomes an empty model.

Transformers is imported only when the model or the folder is one of its own.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qpass.errors import CheckpointError
from qpass.formats import compressed_tensors_config_writer
from qpass.layers.tied_table import TiedTable

if TYPE_CHECKING:
    from qpass.plan_model import Plan

_BUILDING = threading.RLock()
_MOST_BUFFERS = 1 << 30  # bytes of what a model computes at construction: rotary frequencies, masks


def is_transformers(model: Any) -> bool:
    """Whether this is a Transformers model; imports nothing."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def write_config(model: nn.Module, plan: Plan | None) -> None:
    """Put the `quantization_config` that matches the packed layers into a Transformers model's config."""
    if is_transformers(model):
        config: Any = model.config
        said = () if plan is None else (plan.recipe.to_dict(), plan.asked)
        config.quantization_config = compressed_tensors_config_writer.write_config(model, *said)
        # Packed tensors are saved under the names they have; Transformers would rename them halfway to an older style.
        model.__dict__.setdefault("_qpass_conversions", model.__dict__.get("_weight_conversions"))
        model._weight_conversions = []  # type: ignore[assignment]
        if any(isinstance(module, TiedTable) for module in model.modules()):
            _say_tied(config, False)  # in the files the two are apart, and Transformers must not tie them again
            _untie(model)


def forget_config(model: nn.Module) -> None:
    """Take it out again."""
    if is_transformers(model):
        config: Any = model.config
        config.__dict__.pop("quantization_config", None)
        for name in ("hf_quantizer", "is_quantized", "quantization_method", "_weight_conversions"):
            model.__dict__.pop(name, None)
        if (conversions := model.__dict__.pop("_qpass_conversions", None)) is not None:
            model._weight_conversions = conversions
        head, table = (getattr(one(), "weight", None)  # type: ignore[operator]
                       for one in (model.get_output_embeddings, model.get_input_embeddings))
        if head is not None and head is table:
            _say_tied(config, True)


def _untie(model: nn.Module) -> None:
    """Numbers of its own for each parameter that the config's one word ties as well, such as the bias of a head."""
    held = dict(model.named_parameters(remove_duplicate=False))
    for name, of in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if (mine := held.get(name)) is not None and mine is held.get(of):
            path, _, leaf = name.rpartition(".")
            own = nn.Parameter(mine.detach().clone(), requires_grad=mine.requires_grad)
            model.get_submodule(path)._parameters[leaf] = own


def _say_tied(config: Any, tied: bool) -> None:
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        if hasattr(part, "tie_word_embeddings"):
            part.tie_word_embeddings = tied


def save_config(model: Any, folder: Path, quantization: Mapping[str, Any] | None) -> None:
    """Write config.json, and generation_config.json if the model generates, as save_pretrained does."""
    if not is_transformers(model):
        config = {"architectures": [type(model).__name__], "qpass_module": f"{type(model).__module__}."
                  f"{type(model).__qualname__}", "quantization_config": quantization}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return
    data = json.loads(model.config.to_json_string())
    data.update(architectures=[type(model).__name__], dtype=str(model.dtype).removeprefix("torch."))
    data.pop("quantization_config", None)
    if quantization is not None:
        data["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def empty_model(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    """The Transformers model that `folder` describes, its parameters on the meta device, its buffers real.

    No code from the folder is run. Raises CheckpointError if Transformers does not know the class.
    """
    model_class, loaded = _class_and_config(folder, config)
    loaded.__dict__.pop("quantization_config", None)
    return empty_like(model_class, loaded, folder)


def empty_like(model_class: Any, config: Any, folder: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The same of a class and a config of Transformers; `folder` is where they are from."""
    try:
        with torch.device("meta"):
            buffers = sum(buffer.nbytes for buffer in model_class._from_config(config).buffers())
        if buffers > _MOST_BUFFERS:
            raise ValueError(f"it computes tables of {buffers} bytes")
        with _parameters_on_meta():
            model: nn.Module = model_class._from_config(config, **({} if dtype is None else {"dtype": dtype}))
    except Exception as error:  # sizes that no model has, or of the wrong kind
        raise CheckpointError(f"{folder / 'config.json'} describes a model that cannot be built: "
                              f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    _generation_config(model, folder)
    model.tie_weights()  # type: ignore[operator]
    return model


def empty_causal_model(config: Any, where: Path) -> nn.Module:
    """The same of a config that names no class: the causal language model of its kind."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(f"{where}: Transformers {transformers.__version__} has no causal language model of "
                              f"{type(config).__name__}")
    with _parameters_on_meta():
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        try:
            model: nn.Module = model_class._from_config(config)
        except Exception as error:  # sizes that no model has
            raise CheckpointError(f"{where} describes a model that cannot be built: "
                                  f"{type(error).__name__}: {error}") from error
    model.tie_weights()  # type: ignore[operator]
    return model


def load_float(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    """A float Transformers model with its weights, in the dtype of the checkpoint.

    Raises CheckpointError if the weights are not those of the model that the config describes.
    """
    model_class, loaded = _class_and_config(folder, config)
    try:
        model: nn.Module = model_class.from_pretrained(folder, config=loaded, dtype="auto", local_files_only=True,
                                                       trust_remote_code=False, use_safetensors=True)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder} does not load as the float model that its config describes, and the config "
                              "names no quantization; if its weights are quantized, put quantization_config back. "
                              f"Transformers says: {str(error).splitlines()[0] if str(error) else ''}") from error
    return model


def _class_and_config(folder: Path, config: Mapping[str, Any]) -> tuple[Any, Any]:
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{folder / 'config.json'}: architectures is {names!r}, and must be a list of names")
    if not config.get("model_type") or not names:
        raise CheckpointError(f"{folder / 'config.json'} names no architecture of Transformers; for a model of your "
                              "own give the float model to fill: qpass.load(folder, model=model)")
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(f"{folder} holds a Transformers model ({names[0]}), and Transformers is not installed; "
                              "pip install 'qpass-torch[hf]'") from error
    model_class = getattr(transformers, names[0], None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise CheckpointError(f"{folder / 'config.json'}: Transformers {transformers.__version__} has no model class "
                              f"{names[0]!r}; code from checkpoints is never run. Build the model yourself and give it "
                              "to qpass.load(folder, model=model)")
    try:
        loaded = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever Transformers finds wrong with the file
        raise CheckpointError(f"{folder / 'config.json'} cannot be read by Transformers: {error}") from error
    return model_class, loaded


def _generation_config(model: Any, folder: Path) -> None:
    if model.can_generate() and (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, every parameter that a module registers moves to the meta device, before anything initializes it.

    Buffers stay: what a model computes at construction, such as rotary frequencies, is in no checkpoint.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if isinstance(param, Tensor) and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    with _BUILDING, torch.no_grad():
        nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]
