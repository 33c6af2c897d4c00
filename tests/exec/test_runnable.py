"""Plans of random jobs of small real models are built and trained for a step, on fake tensors.

The rules of the search are shared with the refusals of `mist apply`, so these cannot test
themselves: here every stage of every plan found is really divided, wrapped and run by
`mist.exec.dryrun.dry_run`, each in a process of its own as in `mist verify` (torch keeps what it
found out about meshes of ranks). What torch then refuses is a rule that is missing.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import pytest

from mist.exec.dryrun.dry_run import look
from mist.exec.dryrun.dry_runs import dry_run
from mist.plans.plan import Plan
from mist.plans.search_space import SearchSpace
from mist.plans.workload import ScheduleKind
from mist.rules.apply import refuse_unplayable
from mist.symbolic.job import Job
from mist.symbolic.load_programs import quiet
from mist.symbolic.program import ModelPrograms
from mist.workflow.request import Question, compiled, job_of
from tests.exec.layouts import plan_of as written
from tests.exec.running import variant_of
from tests.small_models import MODELS
from tests.test_runnable import Case, layouts, plan_of, traits

_SMALL: Final = MappingProxyType(
    {"vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    | {"max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
)
_HEADS: Final = MappingProxyType({"num_key_value_heads": 2, "head_dim": 16})


def _config(kind: str, name: str, layers: int, **more: object) -> dict[str, object]:
    known = {"model_type": kind, "architectures": [name], "num_hidden_layers": layers}
    return {**_SMALL, **known, **more}


FAMILIES: Final[dict[str, dict[str, Any]]] = {
    "llama tied": _config("llama", "LlamaForCausalLM", 5, **_HEADS, tie_word_embeddings=True),
    "gemma2": _config("gemma2", "Gemma2ForCausalLM", 4, **_HEADS, sliding_window=64),
    "qwen3": _config("qwen3", "Qwen3ForCausalLM", 6, **_HEADS, tie_word_embeddings=False),
    "opt": _config("opt", "OPTForCausalLM", 4, ffn_dim=128, word_embed_proj_dim=64),
    "gpt-neox": _config("gpt_neox", "GPTNeoXForCausalLM", 4),
    "phi3": _config("phi3", "Phi3ForCausalLM", 4, **_HEADS),
}
RATIOS: Final = MappingProxyType(
    {"weights": (0.0, 1.0), "grads": (0.0, 1.0), "optimizer": (0.0, 0.5), "activations": (0.0, 0.5)}
)
PER_FAMILY: Final = 10


def models_in(folder: Path) -> dict[str, Path]:
    """A file for each family, and the plain module of the command line's tests."""
    files = {"plain": folder / "tiny.py"}
    files["plain"].write_text(MODELS["tiny.py"])
    for name, config in FAMILIES.items():
        files[name] = folder / f"{name.replace(' ', '-')}.json"
        files[name].write_text(json.dumps(config))
    return files


def case(rng: np.random.Generator, asked: Question, known: ModelPrograms) -> Case:
    """A random number of GPUs, of stages, and mostly one schedule and one tp."""
    num_gpus = int(rng.choice([2, 4, 8]))
    gpu = str(rng.choice(["h100-sxm", "l4"]))
    batch = num_gpus * int(rng.choice([2, 4]))
    job = job_of(replace(asked, num_gpus=num_gpus, gpu=gpu, global_batch=batch), known)
    space = SearchSpace(offload=RATIOS, pp=_one_of(rng, job, num_gpus))
    if rng.uniform() < 0.8:
        space = replace(space, schedules=(list(ScheduleKind)[rng.integers(4)],))
    if rng.uniform() < 0.5 and job.facts.undivided is None:
        space = replace(space, tp=(2,))
    return Case(job=job, space=space, memory=float(rng.choice([1.02, 1.1, 1.3, 3.0])))


def _one_of(rng: np.random.Generator, job: Job, num_gpus: int) -> tuple[int, ...]:
    return (
        int(rng.choice([n for n in (1, 2, 2, 4) if num_gpus % n == 0 and n <= job.num_layers])),
    )


def plans(path: Path, seed: int) -> Iterator[tuple[Plan, Job]]:
    """The plans of random jobs of one model, at most `PER_FAMILY`."""
    asked = Question(model=str(path), num_gpus=2, seq_len=128, global_batch=8)
    known = compiled(asked, quiet)
    rng, found = np.random.default_rng(seed), 0
    for _ in range(3 * PER_FAMILY):
        each = case(rng, asked, known)
        for layout in layouts(each)[:1]:
            plan = plan_of(each.job, layout)
            yield replace(plan, model=replace(plan.model, source=str(path))), each.job
            found += 1
        if found == PER_FAMILY:
            return


@pytest.mark.slow
def test_heads_that_a_module_counts_are_divided_on_every_stage(tmp_path: Path) -> None:
    """Each rank's attention has fewer heads; layers of other stages are not there to be told."""
    path = models_in(tmp_path)["plain"]
    plan = written(variant_of("pp2 tp2 sp"), tmp_path)
    plan = replace(plan, model=replace(plan.model, source=str(path)))
    assert all(look(plan, stage, "cpu").peak_bytes > 0 for stage in (0, 1))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_plans_of_random_jobs_are_really_built(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    for seed, (name, path) in enumerate(models_in(tmp_path).items()):
        for plan, job in plans(path, seed):
            refuse_unplayable(plan, job.facts)
            for found in dry_run(plan, range(len(plan.stages)), quiet):
                assert found.peak_bytes > 0, (name, plan)
            seen.update(["plans", name, *traits(plan, job)])
            seen["tp"] += any(stage.tp > 1 for stage in plan.stages)
    print(seen)
    assert seen["plans"] >= 60
    for trait in ("tied pipeline", "unlike stages", "offload", "full", "tp", *ScheduleKind):
        assert seen[trait], trait
