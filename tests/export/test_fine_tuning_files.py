"""LLaMA-Factory and axolotl files, and modules of Megatron-Bridge, as people have them."""

from pathlib import Path

import pytest

from mist.errors import InputError
from mist.export.axolotl_yaml import read_axolotl
from mist.export.llamafactory_yaml import read_llamafactory
from mist.export.megatron_bridge import read_bridge
from mist.export.target import ExportSource
from mist.export.targets import target_named
from mist.plans.plan import Offload
from mist.workflow.foreign_files import foreign_file
from tests.export.test_files_of_people import AXOLOTL as PLAIN_AXOLOTL
from tests.sample_plans import sample_plan, stage_plan

AXOLOTL = f"{PLAIN_AXOLOTL}learning_rate: 2.0e-5\nsample_packing: true\n"


def test_an_axolotl_file_without_fsdp_divides_nothing() -> None:
    said = read_axolotl(AXOLOTL, "a.yaml")
    assert said.knobs == {"tp": 1, "zero": 0, "dp_replicate": 1, "micro_batch": 2}
    assert (said.checkpoint, said.seq_len, said.precision) == ("full", 4096, "bf16")
    # Neither ranks nor the batch follow from the file.
    assert said.num_gpus is None
    assert said.global_batch is None
    assert said.unmodelled == ("sample_packing = True",)


def test_axolotl_ranks_follow_from_the_sizes() -> None:
    more = "dp_shard_size: 4\ndp_replicate_size: 2\ntensor_parallel_size: 2\nfsdp_version: 1\n"
    more += "fsdp_config: {reshard_after_forward: false, offload_params: true}\n"
    said = read_axolotl(AXOLOTL + more, "a.yaml")
    assert (said.num_gpus, said.dp, said.num_micro_batches) == (16, 8, 4)
    assert said.knobs["zero"] == 2
    assert said.offload == Offload(weights=1.0, grads=1.0, optimizer=1.0)
    assert "fsdp_version = 1 (predicted as 2)" in said.unmodelled


def test_a_number_that_is_none_names_its_key() -> None:
    with pytest.raises(InputError) as refusal:
        read_axolotl(AXOLOTL.replace("size: 2", "size: two"), "a.yaml")
    assert str(refusal.value) == "a.yaml: micro_batch_size 'two' is no whole number from 1 up."


LLAMA = """model_name_or_path: some/model
stage: sft
finetuning_type: full
deepspeed: ds.json
cutoff_len: 2048
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
bf16: true
dataset: mine
packing: true
"""
DEEPSPEED = """{"train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto",
"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}"""


def test_a_llamafactory_file_is_read_with_its_json(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(DEEPSPEED)
    said = read_llamafactory(LLAMA, str(tmp_path / "l.yaml"))
    assert said.knobs["zero"] == 3
    assert said.knobs["micro_batch"] == 1
    assert said.offload == Offload(optimizer=1.0)
    # Checkpointing is on unless it is switched off.
    assert (said.checkpoint, said.seq_len, said.num_micro_batches) == ("full", 2048, 8)
    assert said.unmodelled == ("packing = True",)


def test_a_json_that_is_missing_or_says_another_batch(tmp_path: Path) -> None:
    path = str(tmp_path / "l.yaml")
    with pytest.raises(InputError, match=r"deepspeed 'ds.json': .* is no file"):
        read_llamafactory(LLAMA, path)
    (tmp_path / "ds.json").write_text(DEEPSPEED.replace('gpu": "auto"', 'gpu": 4'))
    with pytest.raises(InputError, match=r"per_device_train_batch_size 1, but .* says .* 4"):
        read_llamafactory(LLAMA, path)


def test_training_of_a_part_is_refused() -> None:
    with pytest.raises(InputError, match="finetuning_type 'lora': only full training"):
        read_llamafactory(LLAMA.replace(": full", ": lora"), "l.yaml")


def test_a_bridge_module_names_what_it_cannot_read_by_line() -> None:
    text = "def set_plan(cfg):\n    cfg.model.tensor_model_parallel_size = degree\n"
    with pytest.raises(InputError) as refusal:
        read_bridge(text, "b.py")
    assert str(refusal.value) == (
        "b.py, line 2: cfg.model.tensor_model_parallel_size = degree: it is no constant."
    )
    said = read_bridge("cfg.model.tensor_model_parallel_size = 2\ncfg.model.fp8 = True\n", "b.py")
    assert said.knobs["tp"] == 2
    assert said.unmodelled == ("cfg.model.fp8 = True",)


def test_a_bridge_module_is_python_and_each_line_has_its_field() -> None:
    plan = sample_plan(stages=(stage_plan(), stage_plan(first=8, device=4)))
    subject = ExportSource(plan=plan, path="plan.yaml", config={})
    (text,) = target_named("megatron-bridge").write(subject).files.values()
    scope: dict[str, object] = {}
    exec(compile(text, "bridge_plan.py", "exec"), scope)
    assert callable(scope["set_plan"])
    lines = [line for line in text.splitlines() if line.strip().startswith("cfg.")]
    assert len(lines) > 8
    assert all("  # " in line for line in lines)


def test_a_module_of_several_recipes_is_refused(tmp_path: Path) -> None:
    """Of two layouts in one file nothing says which is meant."""
    one = "def {}():\n    cfg.model.tensor_model_parallel_size = 2\n    return cfg\n"
    path = tmp_path / "recipes.py"
    path.write_text(one.format("small") + one.format("large"))
    with pytest.raises(InputError, match=r"has 2 recipes \(small, large\). Give a file with one"):
        foreign_file(str(path))


@pytest.mark.parametrize(
    ("value", "precision"),
    [('"bf16_mixed"', "bf16"), ('"16_mixed"', "fp16"), ("None", "fp32"), ("of('bf16')", "bf16")],
)
def test_the_precision_of_a_recipe(value: str, precision: str) -> None:
    text = f"cfg.model.tensor_model_parallel_size = 1\ncfg.mixed_precision = {value}\n"
    assert read_bridge(text, "b.py").precision == precision


def test_a_precision_that_is_not_predicted_is_listed() -> None:
    said = read_bridge("cfg.mixed_precision = of('fp8_cs')\n", "b.py")
    assert (said.precision, said.unmodelled) == (None, ("cfg.mixed_precision = of('fp8_cs')",))


def test_a_number_that_is_none_names_its_field() -> None:
    with pytest.raises(InputError, match=r"b.py: cfg.train.micro_batch_size two is no whole"):
        read_bridge('cfg.train.micro_batch_size = "two"\n', "b.py")
