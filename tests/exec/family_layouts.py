"""One tiny model of each family under data, tensor and pipeline parallelism of two ranks."""

from typing import Final

from tests.exec.layouts import S, Variant
from tests.tiny_families import file_of

FAMILIES: Final = (
    "llama", "qwen2", "qwen3", "qwen3-moe", "mixtral", "mistral", "gemma2", "gemma3", "gpt2",
    "gpt-neox", "opt", "bloom", "mpt", "starcoder2", "stablelm", "cohere", "olmo2", "glm4",
    "smollm3", "gpt-oss", "deepseek-v3", "lfm2", "bamba", "granite4-h", "bert", "modernbert",
    "phi3", "falcon", "falcon-new", "gptj", "gpt-neo",
)  # fmt: skip
# What the rules leave of others: products of low rank beside each matrix, keys and values in one,
# two streams that meet in attention; norms over what is divided; sequences that stay whole
# (attention in no module of its own, a condition), encoders, layers that are called again or read
# keys of earlier ones, no layers at all.
OTHERS: Final = {
    "lora": ("dp2", "tp2", "pp2", "tp2 sp"),
    "pair": ("dp2", "tp2", "pp2", "tp2 sp"),
    "joint": ("dp2", "tp2"),
    "wide-norms": ("tp2", "tp2 sp"),
    "nanogpt": ("dp2", "tp2", "pp2"),
    "flex": ("dp2", "tp2", "pp2"),
    "dit": ("dp2", "tp2"),
    "deberta-v2": ("dp2", "tp2"),
    "t5": ("dp2", "tp2"),
    "bart": ("dp2", "tp2"),
    "albert": ("dp2", "tp2"),
    "gemma4": ("dp2", "tp2"),
    "lstm": ("dp2",),
    "torch-encoder": ("dp2", "tp2", "pp2", "tp2 sp"),
    "torch-tokens-first": ("dp2", "tp2"),
    "torch-transformer": ("dp2", "tp2"),
    "torch-asked": ("dp2", "tp2"),
    "torch-images": ("dp2", "tp2"),
    # Images before texts: of one stage, as what the tower gives is changed before the next layers.
    "gemma3-vl": ("dp2", "tp2"),
    "qwen2.5-vl": ("dp2", "tp2"),
    "smolvlm": ("dp2", "tp2"),
}
FOUR_LAYERS: Final = (
    "t5", "bart", "gemma4", "torch-transformer", "torch-images", "gemma3-vl", "qwen2.5-vl",
    "smolvlm",
)  # fmt: skip
NUM_LAYERS: Final = dict.fromkeys(FOUR_LAYERS, 4) | {"lstm": 1}


def _kinds(num_layers: int) -> dict[str, tuple[S, ...]]:
    return {
        "dp2": (S(dp=2, zero=2, layers=(num_layers,)),),
        "tp2": (S(tp=2, layers=(num_layers,)),),
        "pp2": (S(layers=(1,)), S(layers=(num_layers - 1,))),
        "tp2 sp": (S(tp=2, sp=True, layers=(num_layers,)),),
    }


OF_FAMILIES: Final = tuple(
    Variant(name=f"tiny {name} {kind}", model=file_of(name), stages=stages, micro=8)
    for name in (*FAMILIES, *OTHERS)
    for kind, stages in _kinds(NUM_LAYERS.get(name, 2)).items()
    if kind in OTHERS.get(name, (kind,))
)
