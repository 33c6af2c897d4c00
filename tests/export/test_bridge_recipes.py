"""Recipes of Megatron-Bridge by name: the table, modules and scripts that override it."""

from pathlib import Path

import pytest

from mist.errors import InputError
from mist.export.bridge_recipes import bridge_recipes
from mist.export.megatron_bridge import read_bridge
from mist.export.target import Configuration
from mist.trace.models.presets import PRESETS
from mist.workflow.checking import HandLayout
from mist.workflow.foreign_files import check_file, foreign_file
from mist.workflow.request import Question
from tests.toys import toy_graph
from tests.workflow.answering import answer_with

ROWS = bridge_recipes()
PLAIN = "qwen3_8b_pretrain_4gpu_h100_bf16_config"


def of_recipe(name: str) -> Configuration:
    """What the name of a recipe says, as `mist check NAME` has it."""
    file = foreign_file(name)
    assert file is not None
    assert file.target.name == "megatron-bridge"
    return file.configuration


@pytest.mark.parametrize("name", ROWS)
def test_each_recipe_of_the_table_is_read(name: str) -> None:
    row = ROWS[name]
    refused = f"{name}: cfg.model.context_parallel_size = {row.cp} is not predicted"
    if row.cp > 1:
        with pytest.raises(InputError, match=refused):
            foreign_file(name)
        return
    said = of_recipe(name)
    assert (said.knobs["tp"], said.knobs["pp"], said.knobs["vpp"]) == (row.tp, row.pp, row.vpp or 1)
    assert (said.global_batch, said.seq_len, said.precision) == (
        row.global_batch, row.seq_len, "bf16",
    )  # fmt: skip
    assert (said.knobs["zero"], said.shards_sequence, said.model) == (1, row.sp, row.model)
    listed = ("cfg.comm_overlap = 'tp_comm_overlap'", "cfg.ddp.grad_reduce_in_fp32 = False")
    assert set(said.unmodelled) <= set(listed)


# What the functions' own docstrings recommend, in Megatron-Bridge 0.6.2.
RECOMMENDED = {
    "llama32_3b_pretrain_config": "TP=1, PP=1, CP=1",
    "llama3_8b_16k_pretrain_config": "TP=4, PP=2, CP=2, SP=True",
    "llama3_8b_128k_pretrain_config": "TP=4, PP=2, CP=8, SP=True",
    "llama3_70b_pretrain_config": "TP=4, PP=4, VPP=5, CP=2, SP=True",
    "llama3_70b_64k_pretrain_config": "TP=8, PP=4, CP=8, SP=True",
    "llama31_405b_pretrain_config": "TP=8, PP=8, VPP=2, CP=4, SP=True",
    "qwen3_8b_pretrain_config": "TP=1, PP=1, CP=1",
    "qwen3_14b_pretrain_config": "TP=8, PP=1",
    "qwen3_32b_pretrain_config": "TP=8, PP=2",
}


@pytest.mark.parametrize("name", RECOMMENDED)
def test_a_recipe_is_as_its_docstring_recommends(name: str) -> None:
    for word in RECOMMENDED[name].split(", "):
        degree, _, value = word.partition("=")
        assert str(getattr(ROWS[name], degree.lower())) == value


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_divides_its_batch_its_machine_and_its_model(name: str) -> None:
    """A digit of the table that is wrong mostly makes a layout that cannot be."""
    row = ROWS[name]
    ranks = row.tp * row.pp * row.cp
    assert (row.num_gpus or ranks) % ranks == 0
    assert row.global_batch % (row.micro_batch * ((row.num_gpus or ranks) // ranks)) == 0
    assert row.seq_len % (row.tp * row.cp) == 0
    if row.model in PRESETS and not row.more.get("model.account_for_loss_in_pipeline_split"):
        assert PRESETS[row.model]["num_hidden_layers"] % (row.pp * (row.vpp or 1)) == 0


def test_what_stands_behind_a_recipe_overrides_it() -> None:
    text = (
        "from megatron.bridge import recipes\n\ndef mine():\n"
        f"    cfg = recipes.{PLAIN}()  # ours\n"
        "    cfg.model.tensor_model_parallel_size = 2\n    cfg.train.global_batch_size = 64\n"
        "    cfg.ddp.use_distributed_optimizer = False\n    cfg.mixed_precision = '16_mixed'\n"
        "    return cfg\n"
    )
    before, said = of_recipe(PLAIN), read_bridge(text, "b.py")
    assert (before.launched, said.launched) == (4, None)  # the machine of ours is not known
    assert (before.knobs["tp"], before.knobs["zero"], before.global_batch) == (4, 1, 32)
    assert (said.knobs["tp"], said.knobs["zero"], said.global_batch) == (2, 0, 64)
    assert said.precision == "fp16"
    assert said.seq_len == before.seq_len  # which the module leaves as it is
    assert said.unmodelled == ()


def test_a_strategy_counts_where_fsdp_reads_it() -> None:
    """Qwen 3 leaves the strategy of all pretraining recipes, Qwen 2 sets another one."""
    for name, level in {PLAIN: 3, "qwen2_7b_pretrain_config": 0}.items():
        said = read_bridge(f"cfg = {name}()\ncfg.ddp.use_megatron_fsdp = True\n", "b.py")
        assert (said.knobs["zero"], said.unmodelled) == (level, ())
    own = "cfg.ddp.data_parallel_sharding_strategy = 'optim'"
    (listed,) = read_bridge(f"cfg = {PLAIN}()\n{own}\n", "b.py").unmodelled
    assert listed.startswith("--data-parallel-sharding-strategy optim (Megatron ignores it")


def test_context_parallelism_of_a_recipe_is_refused_until_it_is_overridden() -> None:
    text = "cfg = llama3_70b_pretrain_config()\n"
    with pytest.raises(InputError, match=r"^b.py, line 1: cfg.model.context_parallel_size = 2 is"):
        read_bridge(text, "b.py")
    said = read_bridge(f"{text}cfg.model.context_parallel_size = 1\n", "b.py")
    assert (said.knobs["tp"], said.knobs["pp"], said.knobs["vpp"]) == (4, 4, 5)


def test_a_recipe_that_is_not_known_is_refused_with_the_nearest_names(tmp_path: Path) -> None:
    for name in ("qwen3_8b_pretrain_2gpu_config", "qwen3_8b_sft_config"):
        with pytest.raises(
            InputError, match=f"^mist check {name}: the defaults.*Did you mean.*qwen3_8b_pre"
        ):
            foreign_file(name)
    path = tmp_path / "run.sh"
    path.write_text("torchrun run_recipe.py --recipe qwen3_8b_sft_config\n")
    with pytest.raises(InputError, match=r"run.sh, line 1: --recipe qwen3_8b_sft_config: the"):
        foreign_file(str(path))
    assert foreign_file("llama3_config") is None  # a model, or nothing


def test_a_model_of_its_own_is_not_that_of_the_recipe() -> None:
    text = f"cfg = {PLAIN}()\n"
    assert read_bridge(text, "b.py").model == "qwen3-8b"
    assert read_bridge(f"{text}cfg.model = mine()\n", "b.py").model is None


def test_an_unknown_recipe_of_a_module_is_listed() -> None:
    said = read_bridge("cfg = mine()\ncfg.model.tensor_model_parallel_size = 2\n", "b.py")
    assert (said.unmodelled, said.model) == (("cfg = mine()",), None)


SCRIPT = f"""RECIPE={PLAIN}
torchrun --nnodes=2 --nproc_per_node=8 run_recipe.py --recipe $RECIPE \\
    --dataset llm-pretrain-mock --peft_scheme lora \\
    model.tensor_model_parallel_size=2 model.sequence_parallel=true \\
    train.train_iters=10 dataset.seq_length=8192
"""


def test_a_script_names_a_recipe_and_overrides_it(tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    path.write_text(SCRIPT)
    file = foreign_file(str(path))
    assert file is not None
    said = file.configuration
    assert (said.knobs["tp"], said.shards_sequence, said.seq_len) == (2, True, 8192)
    assert (said.global_batch, said.launched, said.model) == (32, 16, "qwen3-8b")
    assert said.unmodelled == ("--peft_scheme lora",)
    assert said.untouched == ("cfg.train.train_iters",)


def test_a_module_or_a_comment_that_speaks_of_a_script_is_none(tmp_path: Path) -> None:
    start = f"run_recipe.py --recipe {PLAIN}"
    module = f'"""Start it: {start} """\ncfg.model.tensor_model_parallel_size = 2\n'
    assert read_bridge(module, "b.py").knobs["tp"] == 2
    path = tmp_path / "run.sh"
    path.write_text(f"# {start}\necho\n")
    assert foreign_file(str(path)) is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("model.context_parallel_size=2", ", line 6: cfg.model.context_parallel_size = 2 is not"),
        ("train.micro_batch_size=two", ", line 6: cfg.train.micro_batch_size two is no whole"),
    ],
)
def test_a_script_is_refused_with_its_line(more: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    path.write_text(SCRIPT.replace("train.train_iters=10", f"\\\n{more}"))
    with pytest.raises(InputError) as refusal:
        foreign_file(str(path))
    assert str(refusal.value).startswith(f"{path}{message}")


def test_the_length_of_the_data_is_that_of_the_model() -> None:
    text = SCRIPT.replace("dataset.seq", "model.seq")
    with pytest.raises(InputError, match=r"^run.sh: model.seq_length alone: .* Set that."):
        read_bridge(text, "run.sh")
    assert read_bridge(f"{SCRIPT} --seq_length 2048", "run.sh").seq_len == 2048


def test_a_recipe_by_name_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(toy_graph(), monkeypatch)
    file = foreign_file(PLAIN)
    assert file is not None
    question = Question(model="toy.py", num_gpus=8, gpu="h100-sxm")
    checked = check_file(file, question, HandLayout(), {"gpus": 8})
    assert f"MODEL is not given: qwen3-8b of {PLAIN} is taken" in checked.notes
    assert (checked.plan.workload.global_batch, checked.plan.workload.seq_len) == (32, 4096)
    stage = checked.plan.stages[0]
    assert (stage.tp, stage.dp, stage.micro_batch, stage.zero, stage.sp) == (4, 2, 2, 1, False)
