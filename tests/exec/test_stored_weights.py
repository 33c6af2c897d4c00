"""Weights from files: the right ones, only a rank's own part of them, and what does not fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mist.errors import InputError
from mist.exec.build.batches import Batches
from mist.exec.build.empty_weights import load
from mist.exec.build.pretrained import SINGLE
from mist.exec.run.stored_weights import stored_weights
from mist.plans.workload import Attention
from tests.exec.forking import RunRanks
from tests.exec.from_files import VARIANTS
from tests.exec.layouts import BATCH, GPT2, LLAMA, SEQ_LEN, plan_of
from tests.exec.parity import SEED


def config_of(fields: dict[str, Any], **more: Any) -> dict[str, Any]:  # noqa: ANN401
    return {**{k: v for k, v in fields.items() if k != "model_type"}, **more}


def saved(model: PreTrainedModel, folder: Path, **options: Any) -> Path:  # noqa: ANN401
    model.save_pretrained(folder, **options)
    return folder


def own_loss(folder: Path) -> float:
    """The loss of the file's model on the first batch of a run, as transformers computes it."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.save(dict(model.named_parameters()), folder.with_suffix(".pt"))
    loaded = load(str(folder), Attention.FLASH)
    plan = plan_of(VARIANTS[0], folder.parent)
    batch = Batches(loaded, plan.workload, SEED).step(0)
    assert isinstance(batch, dict) and batch["input_ids"].shape == (BATCH, SEQ_LEN)
    with torch.no_grad():
        return float(model(**batch).loss)


def test_every_layout_starts_from_the_file_and_reads_its_part(
    tmp_path: Path, forked: RunRanks
) -> None:
    torch.manual_seed(5)
    losses = {}
    for name, tied in (("untied", False), ("tied", True)):
        model = LlamaForCausalLM(LlamaConfig(**config_of(LLAMA, tie_word_embeddings=tied)))
        model.model.norm.weight.data.uniform_(0.5, 1.5)  # no seed gives these
        folder = saved(model.bfloat16(), tmp_path / name, max_shard_size="60KB")
        assert len(list(folder.glob("*.safetensors"))) > 3
        losses[name] = own_loss(folder)
    forked("tests.exec.from_files", tmp_path, num_ranks=2)
    found = json.loads((tmp_path / "found.json").read_text())
    for variant in VARIANTS:
        row = found[variant.name]
        assert row["error"] == 0, variant.name
        assert row["loss"] == pytest.approx(losses[variant.model], abs=2e-6), variant.name
    sizes = {p: p.numel() * 2 for p in model_of(tmp_path / "untied").parameters()}
    total, norms = sum(sizes.values()), sum(sizes[p] for p in sizes if p.dim() == 1)
    assert found["zero3"]["read"] == [total // 2] * 2
    assert found["tp2"]["read"] == [norms + (total - norms) // 2] * 2
    assert sum(found["pp2"]["read"]) == total
    assert max(found["pp2"]["read"]) < 0.8 * total


def model_of(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = LlamaForCausalLM.from_pretrained(folder)
    return model


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return saved(LlamaForCausalLM(LlamaConfig(**config_of(LLAMA))), tmp_path / "llama")


def names_of(folder: Path) -> set[str]:
    return set(stored_weights(folder, load(str(folder), Attention.FLASH).module))


@pytest.mark.parametrize("tied", [True, False])
def test_the_file_of_the_base_model_has_no_prefix(tmp_path: Path, tied: bool) -> None:
    model = LlamaForCausalLM(LlamaConfig(**config_of(LLAMA, tie_word_embeddings=tied)))
    folder = saved(model.model, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "architectures": ["LlamaForCausalLM"]})
    )
    if tied:
        assert names_of(folder) == {name for name, _ in model.named_parameters()}
    else:
        with pytest.raises(InputError, match=r"the folder lacks lm_head.weight\. Give"):
            names_of(folder)


def test_official_gpt2_names_and_masks_are_understood(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(**config_of(GPT2)))
    folder = saved(model, tmp_path / "gpt2")
    tensors = load_file(folder / SINGLE)
    # As published: no prefix, and the causal mask of every layer.
    old = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    old |= {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(4)}
    save_file(old, folder / SINGLE)
    assert names_of(folder) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: {n: v for n, v in t.items() if n != "model.layers.3.mlp.up_proj.weight"},
            "the folder lacks model.layers.3.mlp.up_proj.weight",
        ),
        (
            lambda t: t | {"model.layers.4.mlp.up_proj.weight": torch.zeros(1)},
            "has model.layers.4.mlp.up_proj.weight, which the model has not",
        ),
        (
            lambda t: t | {"model.norm.weight": torch.zeros(65)},
            r"model.norm.weight has shape \[65\], the model \[64\]",
        ),
        (
            lambda t: t | {"model.norm.weight": torch.zeros(64).to(torch.float8_e4m3fn)},
            "model.norm.weight is F8_E4M3, read are F64, F32, F16, BF16",
        ),
    ],
)
def test_weights_of_another_model_are_refused(
    llama: Path,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    words: str,
) -> None:
    save_file(change(load_file(llama / SINGLE)), llama / SINGLE)
    with pytest.raises(InputError, match=words):
        names_of(llama)


EXPERTS = config_of(LLAMA, num_hidden_layers=2, num_experts_per_tok=1)


@pytest.mark.parametrize(
    "model",
    [
        lambda: MixtralForCausalLM(MixtralConfig(**EXPERTS, num_local_experts=12)),
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**EXPERTS, num_experts=12, moe_intermediate_size=32)
        ),
    ],
)
def test_experts_stored_one_by_one_are_stacked(
    tmp_path: Path, model: Callable[[], PreTrainedModel]
) -> None:
    built = model()
    folder = saved(built, tmp_path / "experts")
    assert any(".experts.11." in name for name in load_file(folder / SINGLE))
    stored = stored_weights(folder, load(str(folder), Attention.FLASH).module)
    assert stored.keys() == dict(built.named_parameters()).keys()
    for name, parameter in built.named_parameters():
        last = tuple(slice(size // 2, size) for size in parameter.shape)
        assert torch.equal(stored[name][last], parameter.detach()[last]), name


def test_a_missing_expert_is_refused(tmp_path: Path) -> None:
    folder = saved(MixtralForCausalLM(MixtralConfig(**EXPERTS, num_local_experts=4)), tmp_path)
    tensors = load_file(folder / SINGLE)
    (name,) = (n for n in tensors if "layers.1" in n and ".experts.3.w2" in n)
    save_file({n: value for n, value in tensors.items() if n != name}, folder / SINGLE)
    with pytest.raises(InputError, match=r"experts.down_proj has shape \[3, 64, 128\], the model"):
        names_of(folder)


class WithBuffer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2, bias=False)
        self.register_buffer("mean", torch.zeros(2))


def test_buffers_come_with_the_weights(tmp_path: Path) -> None:
    save_file({"layer.weight": torch.eye(2), "mean": torch.tensor([3.0, 4.0])}, tmp_path / SINGLE)
    model = WithBuffer()
    assert set(stored_weights(tmp_path, model)) == {"layer.weight"}
    assert model.get_buffer("mean").tolist() == [3.0, 4.0]
