"""DeepSpeedFP: `quant_method` deepspeedfp; the weights on disk are plain floats, which that tool rounds at load."""

from __future__ import annotations

from qpass.formats.format_registry import Format, register_format
from qpass.formats.reader import FloatRead, Place, Reader, WeightRead


class DeepSpeedFpReader(Reader):
    """Everything stands under its own name, as it is."""

    def weight(self, place: Place) -> WeightRead | FloatRead | None:
        return None


register_format(Format(
    name="deepspeedfp", title="DeepSpeedFP", methods=("deepspeedfp",), reader=DeepSpeedFpReader,
    reads="recognised: the weights on disk are not quantized", runs="float, or with a recipe as that says"))
