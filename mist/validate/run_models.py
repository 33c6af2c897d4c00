"""From a run's architecture columns to a model: a Hugging Face configuration with two layers.

Costs are affine in the number of layers, so one trace serves every depth.
"""

import re
from dataclasses import dataclass
from typing import Any, Final

from mist.trace import ConfigSource
from mist.validate.measured_runs import Run

TRACED_LAYERS: Final = 2
ADAPTED: Final = ("lora", "qlora")  # tasks that train adapters only
MOE: Final = re.compile(r"moe:(?P<experts>\d+)e-top(?P<chosen>\d+),moe_ffn=(?P<ffn>\d+)")
# A head of any Qwen3 model is 128 wide, whatever hidden / heads is (config.json of 0.6B to 32B).
QWEN3_HEAD: Final = 128
# Adapters of every matrix of a layer; rows do not say their rank. Few FLOPs hang on it.
ADAPTER_RANK: Final = 32  # Megatron-Bridge and NeMo (peft/lora.py: dim 32)
# Parameters that a table of positions has beside the rest; GPT's positions are learned.
POSITIONS: Final = 2048


class Unsupported(Exception):
    """Why a run is not predicted."""


class Impossible(Unsupported):
    """Why a run cannot have run: a prediction too, of failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A model of a run: what is traced, and how many layers there are."""

    config: ConfigSource
    layers: int


def architecture_of(run: Run, *, dropout: bool) -> Architecture:
    """The model of a run. Raises Unsupported, naming what is missing or not known."""
    names = ("hidden", "n_layers", "n_heads", "ffn_hidden", "vocab", "seq_len")
    absent = [name for name in names if not getattr(run, name)]
    if absent:
        raise Unsupported(f"{', '.join(absent)} not given")
    fields = _fields(run, dropout=dropout)
    name = f"{run.arch or 'dense'}-{run.hidden}x{run.ffn_hidden}-v{run.vocab}"
    assert run.n_layers is not None
    rank = ADAPTER_RANK if run.task in ADAPTED else 0
    config = ConfigSource(label=name, name=name, config=fields, adapter_rank=rank)
    return Architecture(config=config, layers=run.n_layers)


def _fields(run: Run, *, dropout: bool) -> dict[str, Any]:
    if found := MOE.match(run.arch):
        return _mixture(run, found)
    if run.arch == "dense-bert":
        return _bert(run)
    if _is_gpt(run):
        return _gpt(run, dropout=dropout)
    if run.arch.startswith("dense-qwen3"):
        return {**_llama(run), "model_type": "qwen3", "head_dim": QWEN3_HEAD}
    if run.arch == "gpt":
        return {**_llama(run), "model_type": "starcoder2"}  # grouped keys, nothing gated
    if not run.arch or run.arch.startswith("dense"):
        return _llama(run)
    raise Unsupported(f"architecture {run.arch or '(blank)'} is not known")


def _is_gpt(run: Run) -> bool:
    """By its name, else by its shape: four times as wide between, as many key heads as heads."""
    if run.arch in ("", "dense", "gpt"):
        return run.ffn_hidden == 4 * (run.hidden or 0) and run.n_kv_heads in (None, run.n_heads)
    return run.arch.startswith("dense-gpt")


def _llama(run: Run) -> dict[str, Any]:
    assert run.hidden is not None and run.n_heads is not None
    return {
        "model_type": "llama",
        "hidden_size": run.hidden,
        "num_attention_heads": run.n_heads,
        "num_key_value_heads": run.n_kv_heads or run.n_heads,
        "intermediate_size": run.ffn_hidden,
        "vocab_size": run.vocab,
        "num_hidden_layers": TRACED_LAYERS,
        "max_position_embeddings": 2**20,
        "tie_word_embeddings": _is_tied(run),
    }


def _gpt(run: Run, *, dropout: bool) -> dict[str, Any]:
    share = 0.1 if dropout else 0.0
    return {
        "model_type": "gpt2",
        "n_embd": run.hidden,
        "n_head": run.n_heads,
        "n_inner": run.ffn_hidden,
        "vocab_size": run.vocab,
        "n_layer": TRACED_LAYERS,
        "n_positions": max(POSITIONS, run.seq_len or 0),
        "resid_pdrop": share,
        "embd_pdrop": share,
        "attn_pdrop": share,
        "activation_function": "gelu_pytorch_tanh",  # one kernel, as training frameworks have it
    }


def _bert(run: Run) -> dict[str, Any]:
    return {
        "model_type": "bert",
        "hidden_size": run.hidden,
        "num_attention_heads": run.n_heads,
        "intermediate_size": run.ffn_hidden,
        "vocab_size": run.vocab,
        "num_hidden_layers": TRACED_LAYERS,
    }


def _mixture(run: Run, found: re.Match[str]) -> dict[str, Any]:
    return {
        **_llama(run),
        "model_type": "mixtral",
        "intermediate_size": int(found["ffn"]),
        "num_local_experts": int(found["experts"]),
        "num_experts_per_tok": int(found["chosen"]),
        "tie_word_embeddings": False,
    }


def _is_tied(run: Run) -> bool:
    """Whether the number of parameters is nearer to one table of embeddings than to two."""
    if run.params_b is None:
        return False
    h, layers, heads = run.hidden or 0, run.n_layers or 0, run.n_heads or 1
    kv = h * (run.n_kv_heads or heads) // heads
    body = layers * (2 * h * h + 2 * h * kv + 3 * h * (run.ffn_hidden or 0))
    tables = (run.params_b * 1e9 - body) / (h * (run.vocab or 1))
    return round(tables) < 2
