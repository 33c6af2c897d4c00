"""One tiny model of each family, that real tensors and real ranks can afford (tiny_families.yaml)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

CONFIGS: Final[Mapping[str, dict[str, Any]]] = yaml.safe_load(
    Path(__file__).with_suffix(".yaml").read_text()
)
