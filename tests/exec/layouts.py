"""Plans of many layouts for tiny models, written by hand: nothing here is searched."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mist.plans.memory_levels import KEEPS_ALL, level_counts
from mist.plans.plan import ClusterRef, ModelRef, Offload, Plan, Schedule, StagePlan
from mist.plans.workload import (
    Attention,
    HeadMode,
    MemoryLevel,
    Optimizer,
    Precision,
    ScheduleKind,
    Workload,
)
from tests.sample_plans import estimate_of, sample_plan, stage_estimate

NUM_LAYERS, SEQ_LEN, BATCH, VOCAB = 4, 32, 16, 256

LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": NUM_LAYERS,
    "n_head": 4,
    "n_positions": 128,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MIXTURES = {  # three experts: no number of ranks divides them evenly
    "mixtral": {**LLAMA, **_EXPERTS, "model_type": "mixtral", "num_local_experts": 3},
    "qwen3-moe": {
        **LLAMA,
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "gpt-oss": {
        **LLAMA,
        **_EXPERTS,
        "model_type": "gpt_oss",
        "head_dim": 16,
        "intermediate_size": 64,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2),
    },
    # A first layer without experts, experts that see every token; attention that tp cannot divide.
    "deepseek": {
        **LLAMA,
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
}
# Tables that scale what they look up (Gemma), that have a row without a gradient (OPT's padding),
# that are added before the layers (OPT's positions); norms of heads (Qwen3); queries, keys and
# values of unlike widths in one matrix (Phi-3).
FAMILIES = {
    "gemma2": {**LLAMA, "model_type": "gemma2", "head_dim": 16, "sliding_window": 16},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 16},
    "phi3": {**LLAMA, "model_type": "phi3", "pad_token_id": 0},
    "one-kv-head": {**LLAMA, "num_key_value_heads": 1},  # attention is whole on every rank
    "opt": {
        "model_type": "opt",
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 128,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "dropout": 0.0,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
    },
}
PLAIN = Path(__file__).parents[2] / "examples" / "my_transformer.py"
PLAIN_SIZES = "DIM, NUM_LAYERS, NUM_HEADS, VOCAB_SIZE, MAX_SEQ_LEN = "


# Which parameters are trained, by words in their names; the others are frozen.
TRAINED = {
    "upper": ("layers.2.attn.", "layers.3", "head"),
    "norms": ("norm",),
    "amid": ("layers.1.mlp_norm", "layers.1.up"),
    "head": ("head",),
    "inputs": ("position",),
}
PARTLY = """
whole = build_model


def build_model() -> nn.Module:
    model = whole()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(word in name for word in {words}))
    return model
"""


def write_models(folder: Path) -> None:
    """The tiny models, as files that a plan can name."""
    (folder / "llama.json").write_text(json.dumps(LLAMA))
    (folder / "tied.json").write_text(json.dumps({**LLAMA, "tie_word_embeddings": True}))
    (folder / "gpt2.json").write_text(json.dumps(GPT2))
    for name, config in {**MIXTURES, **FAMILIES}.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    lines = PLAIN.read_text().splitlines()
    sizes = f"{PLAIN_SIZES}64, {NUM_LAYERS}, 4, {VOCAB}, 128"
    text = "\n".join(sizes if line.startswith(PLAIN_SIZES) else line for line in lines)
    (folder / "plain.py").write_text(text + "\n")
    for name, words in TRAINED.items():
        (folder / f"{name}.py").write_text(text + PARTLY.format(words=words))


@dataclass(frozen=True, slots=True, kw_only=True)
class S:
    """A stage in short: everything that a layout changes."""

    dp: int = 1
    tp: int = 1
    sp: bool = False
    zero: int = 0
    dp_replicate: int = 1
    layers: tuple[int, ...] = (NUM_LAYERS,)
    full: int = 0
    sdpa_only: int = 0
    sac_half: int = 0
    selective: int = 0
    drop_norm: int = 0
    drop_activation: int = 0
    tempo: int = 0
    head: HeadMode = HeadMode.NONE
    offload: Offload = field(default_factory=Offload)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A layout under test. `micro`: samples of all ranks in one micro-batch.

    `rounded`: parity is that of the plan's own precision, else of float64 (tests/exec/double.py).
    `num_steps`: optimizer steps; the second reads all that the first one wrote.
    """

    name: str
    stages: tuple[S, ...]
    model: str = "llama.json"
    micro: int = 16
    kind: ScheduleKind = ScheduleKind.ONE_F_ONE_B
    max_norm: float | None = None
    precision: Precision = Precision.FP32
    rounded: bool = False
    num_steps: int = 2

    @property
    def world_size(self) -> int:
        return sum(stage.dp * stage.tp for stage in self.stages)


def plan_of(variant: Variant, folder: Path) -> Plan:
    """The plan of a variant."""
    vpp = len(variant.stages[0].layers)
    firsts = _firsts([stage.layers for stage in variant.stages])
    devices = [stage.dp * stage.tp for stage in variant.stages]
    stages = tuple(
        _stage(stage, tuple(zip(first, stage.layers, strict=True)), sum(devices[:i]), variant.micro)
        for i, (stage, first) in enumerate(zip(variant.stages, firsts, strict=True))
    )
    return replace(
        sample_plan(),
        model=ModelRef(
            source=str(folder / variant.model), name="tiny", params=1, fingerprint="any"
        ),
        workload=Workload(
            seq_len=SEQ_LEN,
            global_batch=BATCH,
            precision=variant.precision,
            optimizer=Optimizer.ADAMW,
            attention=Attention.FLASH,
            compile=False,
        ),
        cluster=ClusterRef(
            name="here", device="cpu", num_gpus=variant.world_size, gpus_per_node=variant.world_size
        ),
        schedule=Schedule(kind=variant.kind, vpp=vpp),
        num_micro_batches=BATCH // variant.micro,
        stages=stages,
        estimate=estimate_of(*(stage_estimate() for _ in stages)),
        alternatives=(),
        excluded=(),
    )


def _firsts(counts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """The first layer of every chunk: chunk 0 of all stages, then chunk 1 of all, ..."""
    firsts: list[list[int]] = [[] for _ in counts]
    done = 0
    for chunk in range(len(counts[0])):
        for stage, own in enumerate(counts):
            firsts[stage].append(done)
            done += own[chunk]
    return [tuple(each) for each in firsts]


def _stage(s: S, layers: tuple[tuple[int, int], ...], device: int, micro: int) -> StagePlan:
    deeper = [(level, getattr(s, level.column)) for level in MemoryLevel if level is not KEEPS_ALL]
    eager = sum(s.layers) - sum(count for _, count in deeper)
    memory = level_counts((KEEPS_ALL, eager), *deeper)
    return StagePlan(
        layers=layers,
        devices=(device, s.dp * s.tp),
        dp=s.dp,
        tp=s.tp,
        sp=s.sp,
        cp=1,
        ep=1,
        micro_batch=micro // s.dp,
        zero=s.zero,  # type: ignore[arg-type]
        head=s.head,
        memory=dict(memory),
        offload=s.offload,
        dp_replicate=s.dp_replicate,
    )
