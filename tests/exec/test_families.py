"""Families under dp 2, tp 2 (also with its sequence divided) and pp 2: what one process gets.

In float64, to its last digits; and the dry run of each agrees with what was predicted for it.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path

import pytest
import torch

from mist.errors import InputError, ModelError
from mist.exec.build.parallel import assemble
from mist.exec.dryrun.dry_run import look
from mist.exec.observation import Seen
from mist.plans.plan import Plan
from mist.workflow.checking import HandLayout, check_layout
from mist.workflow.request import Question
from mist.workflow.verifying import verify_plan
from tests.exec.family_layouts import FAMILIES, OF_FAMILIES, OTHERS
from tests.exec.forking import RunRanks
from tests.exec.layouts import S, Variant, plan_of
from tests.exec.parity import far, run_variants, settings
from tests.exec.subjects import known_subject
from tests.tiny_families import CONFIGS, FILES, write_family


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_families_agree_with_one_process(family: str, tmp_path: Path, forked: RunRanks) -> None:
    model = write_family(family, tmp_path).name
    variants = [variant for variant in OF_FAMILIES if variant.model == model]
    found = run_variants(variants, tmp_path, forked)
    assert set(found) == {variant.name for variant in variants}
    assert far(found) == {}


def test_stages_do_not_pass_on_a_condition(tmp_path: Path) -> None:
    write_family("dit", tmp_path)
    stages = (S(layers=(1,)), S(layers=(1,)))
    plan = plan_of(Variant(name="pp2", model="dit.py", stages=stages, micro=8), tmp_path)
    with pytest.raises(ModelError) as refusal:
        assemble(known_subject(plan), plan, torch.device("cpu"), settings(None))
    assert str(refusal.value) == (
        "pp 2: mist apply cannot divide dit over stages: a layer takes more than what the layer "
        "before it gives (a condition, an encoder's result); use pp 1"
    )


# The tiny models 16 times as wide, with heads of 64: a stray activation is no part of a peak of
# some hundred MiB. The dry run is of fake tensors.
WIDTHS = {
    "hidden_size", "intermediate_size", "moe_intermediate_size", "shared_intermediate_size",
    "n_embd", "ffn_dim", "word_embed_proj_dim", "d_model", "block_ff_dim", "vocab_size",
    "embedding_size",
}  # fmt: skip
HEADS = {
    "num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "head_dim", "mamba_n_heads",
    "mamba_d_head", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim",
    "v_head_dim", "max_position_embeddings", "n_positions", "max_seq_len",
}  # fmt: skip
HANDS = {
    "dp2": HandLayout(zero=2, micro_batch=1),
    "tp2": HandLayout(tp=2, micro_batch=1),
    "pp2": HandLayout(pp=2, micro_batch=1),
}
COMPARED = (*FAMILIES, "roberta-cls", "electra")
OF_ONE_STAGE = (
    *product(("deberta-v2", "bart"), ("dp2", "tp2")), ("t5", "dp2"), ("albert", "dp2"),
)  # fmt: skip
MOST = 0.03  # of the peak: the bar of the project


def look_here(
    plan: Plan, stages: Sequence[int], progress: object, *, policy: str
) -> tuple[Seen, ...]:
    """Dry runs without the seconds in which a process imports torch."""
    return tuple(look(plan, stage, policy) for stage in stages)


def question_of(model: Path, seq_len: int) -> Question:
    return Question(model=str(model), num_gpus=2, seq_len=seq_len, global_batch=8, gpu="h100-sxm")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), [*product(COMPARED, HANDS), *OF_ONE_STAGE])
def test_prediction_and_program_agree(
    family: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mist.workflow.verifying.dry_run", look_here)
    factors = dict.fromkeys(WIDTHS, 16) | dict.fromkeys(HEADS, 4)
    sizes = {
        name: value * factors[name] if name in factors else value
        for name, value in CONFIGS[family].items()
    }
    model = tmp_path / f"{family}.json"
    model.write_text(json.dumps(sizes))
    for stage in verify_plan(check_layout(question_of(model, 1024), HANDS[kind]).plan).stages:
        assert all(row.agrees for row in stage.collectives), stage.collectives
        assert abs(stage.difference_ratio) <= MOST


# A patch is a token: images of a fixed size have so many.
PATCHES = {"vit": 16, "dinov2": 16}


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*CONFIGS, *FILES} - {*FAMILIES}))
def test_what_the_rules_leave_is_run(family: str, tmp_path: Path) -> None:
    """Every layout that no rule refuses is divided, wrapped and trained for a step."""
    question = question_of(write_family(family, tmp_path), PATCHES.get(family, 64))
    plans = dict[str, Plan]()
    for kind, hand in HANDS.items():
        with suppress(InputError):  # no search offers what the rules refuse
            plans[kind] = check_layout(question, hand).plan
    assert "dp2" in plans
    for plan in plans.values():
        seen = look_here(plan, range(len(plan.stages)), None, policy="cuda")
        assert all(each.peak_bytes > 0 for each in seen)
