"""Options of Megatron-LM that say the model, from the fields of its Hugging Face configuration."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgumentLine:
    """One option, its value ("" for a flag), and the field of the plan that it carries."""

    option: str
    value: str = ""
    field: str

    @property
    def text(self) -> str:
        """As a line of a bash array."""
        value = f" {shlex.quote(self.value)}" if self.value else ""
        return f"    {self.option}{value}  # {self.field}"


# Names of an option of the model, and of fields of configurations that say its number.
SIZES: Final = {
    "--num-layers": ("num_hidden_layers", "n_layer"),
    "--hidden-size": ("hidden_size", "n_embd"),
    "--ffn-hidden-size": ("intermediate_size", "n_inner"),
    "--num-attention-heads": ("num_attention_heads", "n_head"),
    "--num-query-groups": ("num_key_value_heads",),
    "--kv-channels": ("head_dim",),
    "--max-position-embeddings": ("max_position_embeddings", "n_positions"),
    "--vocab-size": ("vocab_size",),
    "--num-experts": ("num_experts", "num_local_experts"),
    "--moe-router-topk": ("num_experts_per_tok",),
    "--moe-ffn-hidden-size": ("moe_intermediate_size",),
}
GATED: Final = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")


def model_lines(config: Mapping[str, Any]) -> Iterator[ArgumentLine]:
    """The options of a Hugging Face configuration."""
    for option, names in SIZES.items():
        for name in names:
            if isinstance(config.get(name), int):
                yield ArgumentLine(option=option, value=str(config[name]), field=f"model: {name}")
    if "num_key_value_heads" in config:
        yield ArgumentLine(option="--group-query-attention", field="model: num_key_value_heads")
    if config and not config.get("tie_word_embeddings", "n_embd" in config):
        option = "--untie-embeddings-and-output-weights"
        yield ArgumentLine(option=option, field="model: tie_word_embeddings")
    if config.get("model_type") in GATED:
        field = "model: model_type"
        yield ArgumentLine(option="--swiglu", field=field)
        yield ArgumentLine(option="--disable-bias-linear", field=field)
        yield ArgumentLine(option="--normalization", value="RMSNorm", field=field)
        yield ArgumentLine(option="--position-embedding-type", value="rope", field=field)
    for name in ("rms_norm_eps", "layer_norm_epsilon"):
        if isinstance(config.get(name), float):
            yield ArgumentLine(
                option="--norm-epsilon", value=str(config[name]), field=f"model: {name}"
            )
    yield from _rope_lines(config)


def _rope_lines(config: Mapping[str, Any]) -> Iterator[ArgumentLine]:
    """The options of rotary positions."""
    rope = _rope_of(config)
    if isinstance(rope.get("rope_theta"), int | float):
        theta = str(int(rope["rope_theta"]))
        yield ArgumentLine(option="--rotary-base", value=theta, field="model: rope_theta")
    if rope.get("rope_type") == "llama3":
        field = "model: rope_type"
        yield ArgumentLine(option="--use-rope-scaling", field=field)
        yield ArgumentLine(option="--rope-scaling-factor", value=str(rope["factor"]), field=field)


def _rope_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a configuration says of rotary positions; newer ones in a section of their own."""
    sections = (config.get(name) or {} for name in ("rope_scaling", "rope_parameters"))
    return {**config, **{name: value for section in sections for name, value in section.items()}}


def unsaid_of_model(config: Mapping[str, Any]) -> Iterator[str]:
    """What a configuration says and no option here: it must be added by hand."""
    if (kind := _rope_of(config).get("rope_type", "default")) not in ("default", "llama3"):
        yield f"rope_type {kind}: the options of Megatron for it are yours to add"
