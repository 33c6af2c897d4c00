"""One tiny model of each family under data, tensor and pipeline parallelism of two ranks."""

import json
from pathlib import Path

from tests.exec.layouts import S, Variant
from tests.tiny_families import CONFIGS

NAMES = tuple(CONFIGS)
LAYERS = 2

KINDS = {
    "dp2": (S(dp=2, zero=2, layers=(LAYERS,)),),
    "tp2": (S(tp=2, layers=(LAYERS,)),),
    "tp2 sp": (S(tp=2, sp=True, layers=(LAYERS,)),),
    "pp2": (S(layers=(1,)), S(layers=(1,))),
}
OF_FAMILIES = tuple(
    Variant(name=f"{name} {kind}", model=f"{name}.json", stages=stages, micro=8)
    for name in NAMES
    for kind, stages in KINDS.items()
)


def write_families(folder: Path) -> None:
    """The tiny models, as files that a plan can name."""
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
