"""Writer table: the formats other than compressed-tensors that write a model layer by layer, by name."""

from __future__ import annotations

from qpass.formats.awq_writer import AwqWriter
from qpass.formats.bitsandbytes_writer import BitsAndBytesWriter
from qpass.formats.gptq_writer import GptqWriter
from qpass.formats.layer_writer import LayerWriter
from qpass.formats.modelopt_writer import ModelOptWriter


def writers() -> dict[str, LayerWriter]:
    """The writers by the name that `qpass.save(format=...)` takes."""
    return {writer.name: writer for writer in (AwqWriter(), GptqWriter(1), GptqWriter(2), ModelOptWriter(),
                                               BitsAndBytesWriter())}
