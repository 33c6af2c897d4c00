"""One tiny model of each family under data, tensor and pipeline parallelism of two ranks."""

from typing import Final

from tests.exec.layouts import S, Variant
from tests.tiny_families import file_of

LAYERS: Final = 2
FAMILIES: Final = (
    "llama", "qwen2", "qwen3", "qwen3-moe", "mixtral", "mistral", "gemma2", "gemma3", "gpt2",
    "gpt-neox", "opt", "bloom", "mpt", "starcoder2", "stablelm", "cohere", "olmo2", "glm4",
    "smollm3", "gpt-oss", "deepseek-v3", "lfm2", "bamba", "granite4-h", "bert", "modernbert",
)  # fmt: skip
# Attention is not in a module of its own that is given the activation: sp is refused.
WITHOUT_SP: Final = ("nanogpt",)

KINDS: Final = {
    "dp2": (S(dp=2, zero=2, layers=(LAYERS,)),),
    "tp2": (S(tp=2, layers=(LAYERS,)),),
    "pp2": (S(layers=(1,)), S(layers=(1,))),
    "tp2 sp": (S(tp=2, sp=True, layers=(LAYERS,)),),
}
OF_FAMILIES: Final = tuple(
    Variant(name=f"tiny {name} {kind}", model=file_of(name), stages=stages, micro=8)
    for name in (*FAMILIES, *WITHOUT_SP)
    for kind, stages in KINDS.items()
    if name in FAMILIES or kind != "tp2 sp"
)
