"""One tiny model of each family under data, tensor and pipeline parallelism of two ranks."""

from typing import Final

from tests.exec.layouts import S, Variant
from tests.tiny_families import CONFIGS, FILES, file_of

FAMILIES: Final = (*CONFIGS, *FILES)
LAYERS: Final = 2

KINDS: Final = {
    "dp2": (S(dp=2, zero=2, layers=(LAYERS,)),),
    "tp2": (S(tp=2, layers=(LAYERS,)),),
    "tp2 sp": (S(tp=2, sp=True, layers=(LAYERS,)),),
    "pp2": (S(layers=(1,)), S(layers=(1,))),
}
OF_FAMILIES: Final = tuple(
    Variant(name=f"{name} {kind}", model=file_of(name), stages=stages, micro=8)
    for name in FAMILIES
    for kind, stages in KINDS.items()
)
