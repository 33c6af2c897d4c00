"""The models of the Mist paper (EuroSys'25) and the jobs that benchmarks search.

GPT, Llama and Falcon in the sizes of its evaluation, as the artifact configures them (Dazz993/Mist
d69e530, benchmark/mist/configs/model): one vocabulary for all, the head not tied to the embedding.
"""

import json
import math
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from mist.model.summary import LayerRun
from mist.plans.plan import Limits
from mist.plans.workload import Attention, Precision
from mist.symbolic.job import Job
from mist.symbolic.load_programs import model_programs, quiet
from mist.symbolic.program import ModelPrograms
from mist.trace import ConfigSource
from mist.workflow.request import Question, job_of, limits_of, platform_of, setting_of

SIZES: Final = {  # hidden size, layers, attention heads; GPUs that the paper trains each on
    "1.3b": (2048, 24, 16, 2),
    "2.6b": (2560, 32, 32, 4),
    "6.7b": (4096, 32, 32, 8),
    "13b": (5120, 40, 40, 16),
    "22b": (6144, 48, 64, 32),
}
SAMPLES_PER_GPU: Final = 16  # of its global batch
VOCABULARY: Final = 50304


def gpt(size: str) -> ConfigSource:
    """GPT of a size, trained without dropout."""
    hidden, layers, heads, _ = SIZES[size]
    fields = {
        "model_type": "gpt2",
        "n_embd": hidden,
        "n_head": heads,
        "n_layer": layers,
        "n_positions": 4096,
        "activation_function": "gelu_pytorch_tanh",
    } | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return _source(f"gpt-{size}", fields)


def llama(size: str) -> ConfigSource:
    """Llama as wide and deep as GPT of a size: gated, with 8/3 of the hidden size between."""
    hidden, layers, heads, _ = SIZES[size]
    fields = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": math.ceil(hidden * 8 / 3 / 256) * 256,
        "max_position_embeddings": 4096,
    }
    return _source(f"llama-{size}", fields)


def falcon(size: str) -> ConfigSource:
    """Falcon as wide and deep as GPT of a size: attention and MLP side by side, a norm for each."""
    hidden, layers, heads, _ = SIZES[size]
    fields = {
        "model_type": "falcon",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_kv_heads": heads,
        "new_decoder_architecture": True,
        "num_ln_in_parallel_attn": 2,
        "bias": False,
        "max_position_embeddings": 4096,
    }
    return _source(f"falcon-{size}", fields)


FAMILIES: Final = {"gpt": gpt, "llama": llama, "falcon": falcon}


def _source(name: str, fields: dict[str, Any]) -> ConfigSource:
    ends = {"vocab_size": VOCABULARY, "tie_word_embeddings": False}
    return ConfigSource(label=name, name=name, config=fields | ends)


def write_config(source: ConfigSource, folder: Path) -> str:
    """The configuration as a file of that name, as `mist check` takes it; its path."""
    path = folder / f"{source.name}.json"
    path.write_text(json.dumps(dict(source.config)))
    return str(path)


def paper_question(
    model: str, gpu: str, *, runtime: str = "torch", attention: Attention = Attention.FLASH
) -> Question:
    """A setting of the paper: 2,048 tokens on L4, 4,096 on A100, 16 samples per GPU."""
    num_gpus = SIZES[model.split("-")[1]][3]
    return Question(
        model=model,
        num_gpus=num_gpus,
        gpu=gpu,
        runtime=runtime,
        attention=attention,
        precision=Precision.FP16 if runtime == "mist-fp16" else Precision.BF16,
        cluster="aws-p4d" if gpu == "a100-sxm-40" else None,
        seq_len=2048 if gpu == "l4" else 4096,
        global_batch=SAMPLES_PER_GPU * num_gpus,
    )


def prepared(asked: Question, num_layers: int | None = None) -> tuple[Job, Limits]:
    """The job of a question and its limits; with `num_layers` the model is made that deep.

    Layers of one kind cost the same each: one trace serves every depth.
    """
    assert isinstance(asked.model, str)
    programs = _programs(replace(asked, num_gpus=2, global_batch=2, seq_len=None))
    if num_layers is not None:
        assert programs.facts.num_kinds == 1
        runs = (LayerRun(block=0, count=num_layers),)
        programs = replace(programs, facts=replace(programs.facts, layers=runs))
    job = job_of(asked, programs)
    return job, limits_of(job, asked)


_PROGRAMS: Final[dict[str, ModelPrograms]] = {}  # by question


def _programs(asked: Question) -> ModelPrograms:
    if repr(asked) not in _PROGRAMS:
        _PROGRAMS[repr(asked)] = _compiled(asked)
    return _PROGRAMS[repr(asked)]


def _compiled(asked: Question) -> ModelPrograms:
    assert isinstance(asked.model, str)
    family, _, size = asked.model.partition("-")
    source = FAMILIES[family](size) if size in SIZES else asked.model
    chosen = platform_of(asked)
    setting = setting_of(asked, chosen)
    return model_programs(
        source, setting, chosen.runtime, chosen.runtime_hash, quiet, optimizer=asked.optimizer
    )


def machine() -> str:
    """Processors, load and versions: what a time means nothing without."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    return (
        f"{platform.machine()}, {os.cpu_count()} processors, 1 thread, load {load:.1f}, "
        f"Python {platform.python_version()}, numpy {np.__version__}"
    )
