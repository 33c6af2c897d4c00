"""Files as people have them, read as what they say: none of them was written by `mist export`."""

from pathlib import Path

import pytest

from mist.errors import InputError
from mist.export.target import Configuration
from mist.export.targets import target_of
from mist.plans.plan import Offload
from mist.workflow.checking import Checked, HandLayout
from mist.workflow.foreign_files import check_file, foreign_file
from mist.workflow.request import Question
from tests.toys import toy_graph
from tests.workflow.answering import answer_with

MEGATRON = """#!/bin/bash
GPUS_PER_NODE=8
NNODES=${SLURM_NNODES:-"4"}
MODEL_ARGS="
    --num-layers 32 \\
    --seq-length 4096
"
PARALLEL=(
    --tensor-model-parallel-size 4  # within a node
    --pipeline-model-parallel-size 2
    --micro-batch-size 1
    --global-batch-size 128
    --bf16
    --lr 3e-4
)
torchrun --nproc_per_node $GPUS_PER_NODE --nnodes $NNODES pretrain_gpt.py \\
    $MODEL_ARGS "${PARALLEL[@]}" --save $CHECKPOINTS
"""
TOML = """[model]
name = "llama3"
[training]
local_batch_size = 2
seq_len = 8192
steps = 1000
[parallelism]
data_parallel_shard_degree = -1
tensor_parallel_degree = 4
[activation_checkpoint]
mode = "selective"
selective_ac_option = "op"
"""
OLD_TOML = """[training]
batch_size = 1
seq_len = 8192
tensor_parallel_degree = 8
[experimental]
pipeline_parallel_degree = 2
[activation_checkpoint]
mode = "full"
"""
FSDP = """distributed_type: FSDP
num_machines: 2
num_processes: 16
mixed_precision: bf16
fsdp_config:
  fsdp_sharding_strategy: SHARD_GRAD_OP
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_state_dict_type: SHARDED_STATE_DICT
"""
ZERO = """distributed_type: DEEPSPEED
num_processes: 8
mixed_precision: bf16
deepspeed_config:
  zero_stage: 3
  offload_optimizer_device: cpu
  gradient_accumulation_steps: 4
"""
AXOLOTL = """base_model: some/model
sequence_len: 4096
micro_batch_size: 2
gradient_accumulation_steps: 4
bf16: auto
gradient_checkpointing: true
"""


TRAINER = """torchrun --nproc_per_node=4 train.py \\
    --per_device_train_batch_size 2 \\
    --gradient_accumulation_steps 8 --bf16 True --gradient_checkpointing \\
    --model_max_length 2048 --learning_rate 2e-5 --neftune_noise_alpha 5 \\
"""


def read(text: str, name: str) -> Configuration:
    target = target_of(text)
    assert target is not None and target.read is not None
    return target.read(text, name)


def test_a_script_of_strings_arrays_and_variables() -> None:
    said = read(MEGATRON, "train.sh")
    assert said.knobs == {"tp": 4, "micro_batch": 1, "pp": 2, "vpp": 1, "zero": 0}
    assert (said.seq_len, said.global_batch, said.num_layers) == (4096, 128, 32)
    assert (said.launched, said.shards_sequence) == (32, False)
    assert said.unmodelled == ()
    assert said.untouched == ("--lr", "--save")


@pytest.mark.parametrize(
    ("more", "knob", "value"),
    [
        ("--num-layers-per-virtual-pipeline-stage 4", "vpp", 4),
        ("--recompute-activations", "checkpoint", "selective"),
        ("--decoder-first-pipeline-num-layers 15", "layers", (15, 17)),
        ("--decoder-last-pipeline-num-layers 15", "layers", (17, 15)),
    ],
)
def test_other_words_for_the_same(more: str, knob: str, value: object) -> None:
    said = read(MEGATRON.replace("--bf16", f"--bf16\n    {more}"), "train.sh")
    assert said.knobs.get(knob, getattr(said, knob, None)) == value
    assert said.unmodelled == ()


def test_toml_of_torchtitan() -> None:
    said = read(TOML, "a.toml")
    assert (said.knobs["micro_batch"], said.knobs["tp"], said.knobs["zero"]) == (2, 4, 3)
    assert (said.seq_len, said.num_micro_batches, said.checkpoint) == (8192, 1, "selective")
    assert said.untouched == ("model.name", "training.steps")
    assert said.unmodelled == ()


def test_toml_of_earlier_versions() -> None:
    said = read(OLD_TOML, "a.toml")
    assert (said.knobs["tp"], said.knobs["pp"], said.checkpoint) == (8, 2, "full")
    assert said.unmodelled == ()


@pytest.mark.parametrize(
    ("strategy", "zero", "copies"),
    [
        *[("SHARD_GRAD_OP", 2, 1), ("FULL_SHARD", 3, 1), ("1", 3, 1), ("NO_SHARD", 0, 1)],
        *[("HYBRID_SHARD", 3, 2), ("HYBRID_SHARD_ZERO2", 2, 2)],
    ],
)
def test_strategies_of_fsdp1(strategy: str, zero: int, copies: int) -> None:
    said = read(FSDP.replace("SHARD_GRAD_OP", strategy), "a.yaml")
    assert (said.knobs["zero"], said.knobs["dp_replicate"], said.num_gpus) == (zero, copies, 16)
    assert said.checkpoint is None  # the program says it
    assert said.unmodelled == ("fsdp_config.fsdp_version = 1 (predicted as 2)",)


def test_accelerate_with_deepspeed() -> None:
    said = read(ZERO, "a.yaml")
    assert (said.knobs, said.offload) == ({"zero": 3}, Offload(optimizer=1.0))
    assert (said.num_micro_batches, said.runtimes) == (4, ("deepspeed-zero3",))


def test_an_axolotl_file_with_a_json(tmp_path: Path) -> None:
    (tmp_path / "z3.json").write_text(
        '{"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}}'
    )
    said = read(AXOLOTL + "deepspeed: z3.json\n", str(tmp_path / "a.yaml"))
    assert said.knobs == {"tp": 1, "zero": 3, "micro_batch": 2}
    assert (said.precision, said.checkpoint) == ("bf16", "full")
    assert said.runtimes == ("deepspeed-zero3",)


@pytest.mark.parametrize(
    ("more", "zero", "runtime", "offload"),
    [
        ("", 0, "torch", Offload()),
        ("--fsdp 'shard_grad_op auto_wrap'", 2, "torch", Offload()),
        (
            "--fsdp 'full_shard offload' --fsdp_config fsdp.json",
            3,
            "torch",
            Offload(weights=1.0, grads=1.0, optimizer=1.0),
        ),
        ("--deepspeed z2.json", 2, "deepspeed-zero3", Offload()),
        ("--config_file a.yaml", 3, "deepspeed-zero3", Offload(optimizer=1.0)),
    ],
)
def test_a_script_of_a_trainer(
    more: str, zero: int, runtime: str, offload: Offload, tmp_path: Path
) -> None:
    (tmp_path / "fsdp.json").write_text('{"activation_checkpointing": false}')
    (tmp_path / "z2.json").write_text('{"zero_optimization": {"stage": 2}}')
    (tmp_path / "a.yaml").write_text(ZERO)
    said = read(TRAINER + more, str(tmp_path / "train.sh"))
    assert {**said.knobs, "tp": 1} == {"tp": 1, "zero": zero, "micro_batch": 2}
    assert (said.offload, said.runtimes) == (offload, (runtime,))
    assert (said.seq_len, said.num_micro_batches, said.checkpoint) == (2048, 8, "full")
    assert (said.launched, said.precision) == (4, "bf16")
    assert said.untouched == ("learning_rate",)
    assert said.unmodelled == ("neftune_noise_alpha 5",)


def test_adapters_of_a_trainer_are_refused() -> None:
    with pytest.raises(InputError, match=r"train.sh, line 5: lora_r 64 is not predicted"):
        read(f"{TRAINER}    --lora_r 64", "train.sh")


def test_a_file_that_a_script_names_and_that_is_missing() -> None:
    with pytest.raises(InputError, match=r"--deepspeed 'no.json': .*no.json is no file"):
        read(f"{TRAINER}    --deepspeed no.json", "train.sh")


def test_precision_that_the_trainer_says() -> None:
    text = '{"zero_optimization": {"stage": 1}, "bf16": {"enabled": "auto"}}'
    assert read(text, "a.json").precision is None
    assert read(text.replace('"auto"', "true"), "a.json").precision == "bf16"
    assert read(text.replace('"auto"', "false"), "a.json").precision == "fp32"


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        (MEGATRON, "--expert-model-parallel-size 8", "train.sh, line 14: --expert-model-parallel-"),
        (MEGATRON, "--context-parallel-size 2", "line 14: --context-parallel-size 2 is"),
        (MEGATRON, "--zero-stage 3", "line 14: --zero-stage 3 is not predicted"),
        (TOML, "context_parallel_degree = 2", "line 10: parallelism.context_parallel_degree = 2"),
        (AXOLOTL, "adapter: qlora", "line 7: adapter = qlora is not predicted"),
        (AXOLOTL, "load_in_4bit: true", "line 7: load_in_4bit = True is not predicted"),
        (ZERO, "  offload_param_device: nvme", "offload_param_device = nvme is not predicted"),
    ],
)  # fmt: skip
def test_what_decides_and_is_not_predicted_is_refused(text: str, more: str, message: str) -> None:
    place = {MEGATRON: "    --bf16", TOML: "tensor_parallel_degree = 4"}.get(text)
    changed = text.replace(place, f"{place}\n{more}") if place else f"{text}{more}\n"
    with pytest.raises(InputError, match="it decides what a GPU holds") as refusal:
        read(changed, "train.sh" if text == MEGATRON else "a.toml")
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", AXOLOTL.replace("size: 2", "size: two"), ", line 3: micro_batch_size 'two'"),
        ("b.sh", MEGATRON.replace("-size 128", "-size many"), ", line 12: --global-batch-size"),
        ("c.toml", TOML.replace("8192", "8e3"), ", line 5: training.seq_len 8000.0 is no whole"),
        ("d.json", '{"zero_optimization":\n {"stage": "3"}}', ", line 2: zero_optimization.stage"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError) as refusal:
        foreign_file(str(path))
    assert str(refusal.value).startswith(f"{path}{message}")


def judged(text: str, name: str, folder: Path, **typed: object) -> Checked:
    path = folder / name
    path.write_text(text)
    file = foreign_file(str(path))
    assert file is not None
    question = Question(
        model="toy.py",
        num_gpus=int(typed.get("gpus", 1)),  # type: ignore[call-overload]
        seq_len=2048,
    )
    layout = HandLayout(checkpoint=str(typed.get("checkpoint", "none")))
    return check_file(file, question, layout, {"model": "toy.py", **typed})


SHORT = (
    "torchrun --nproc-per-node=8 pretrain_gpt.py --tensor-model-parallel-size 4 --bf16\n"
    "--seq-length 2048 --micro-batch-size 1 --global-batch-size 16\n"
)


@pytest.mark.slow
def test_tensor_parallelism_that_leaves_the_sequence_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(toy_graph(), monkeypatch)
    whole = judged(SHORT, "a.sh", tmp_path).plan
    parts = judged(f"{SHORT}--sequence-parallel\n", "b.sh", tmp_path).plan
    assert whole.cluster.num_gpus == parts.cluster.num_gpus == 8  # as the script starts
    assert (whole.stages[0].sp, parts.stages[0].sp) == (False, True)
    assert whole.overrides == {"runtime.knobs.sequence_parallel": 0.0}
    assert judged(SHORT, "c.sh", tmp_path, gpus=16).plan.cluster.num_gpus == 16


@pytest.mark.slow
def test_the_global_batch_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(toy_graph(), monkeypatch)
    text = AXOLOTL.replace("4096", "2048")
    plan = judged(text, "a.yaml", tmp_path, gpus=4).plan
    assert (plan.workload.global_batch, plan.num_micro_batches) == (4 * 2 * 4, 4)


WRONG = {
    "a.sh": (
        "pretrain_gpt.py --bf16 --seq-length 2048\n--tensor-model-parallel-size 3\n"
        "--micro-batch-size 1 --global-batch-size 16\n",
        "--tp 3 * --pp 1 = 3 does not divide the 8 GPUs (--tensor-model-parallel-size in line 2).",
    ),
    "b.yaml": (
        f"{AXOLOTL.replace('4096', '2048')}fsdp_version: 2\ndp_shard_size: 2\n"
        "tensor_parallel_size: 3\n",
        "tp 3 does not divide the sequence of 2048 tokens, which runtime torch shards with it "
        "(tensor_parallel_size in line 9).",
    ),
    "c.toml": (
        TOML.replace("8192", "2048").replace("= 4", "= 8\npipeline_parallel_degree = 3"),
        "--tp 8 * --pp 3 = 24 is more than the 8 GPUs (parallelism.tensor_parallel_degree in line "
        "9, parallelism.pipeline_parallel_degree in line 10).",
    ),
    "d.sh": (
        f"{SHORT}--num-layers 9\n",
        "the file says num_layers 9, but from toy follows 8 (--num-layers in line 3).",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_layout_that_cannot_be_names_its_settings_and_their_lines(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(toy_graph(), monkeypatch)
    text, words = WRONG[name]
    typed = {} if name == "b.yaml" else {"gpus": 8}
    with pytest.raises(InputError) as refusal:
        judged(text, name, tmp_path, **typed)
    assert str(refusal.value).splitlines()[0] == f"{tmp_path / name}: {words}"


def test_the_model_that_a_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset is taken, and said; a name of a hub is asked for; Python of a file never runs."""
    answer_with(toy_graph(), monkeypatch)
    question = Question(model="a.yaml", num_gpus=4)
    for model, refused in {"llama3-8b": False, "some/model": True, "bait.py": True}.items():
        path = tmp_path / "a.yaml"
        path.write_text(AXOLOTL.replace("some/model", model))
        (tmp_path / "bait.py").write_text("raise SystemExit('it ran')")
        file = foreign_file(str(path))
        assert file is not None
        if refused:
            with pytest.raises(InputError, match=f"does not say MODEL.*Its model, {model}, is nei"):
                check_file(file, question, HandLayout(), {"gpus": 4})
        else:
            notes = check_file(file, question, HandLayout(), {"gpus": 4}).notes
            assert "MODEL is not given: llama3-8b of a.yaml is taken" in notes
