"""The benchmark's modules import each other as a script's neighbours do: from its own folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
