"""What people reported of other frameworks in public: bytes, and whether it fits.

Sizes of the models are those of their papers or configurations; each test names its report.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mist.plans.plan import Offload
from mist.units import GIB
from mist.workflow.checking import Checked, HandLayout, check_layout
from mist.workflow.request import Question
from tests.platform.samples import PROFILES

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}
CONFIGS: dict[str, dict[str, object]] = {
    "gpt2-sized": LLAMA
    | {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
       "num_attention_heads": 12, "vocab_size": 128256, "max_position_embeddings": 8192,
       "tie_word_embeddings": False},
    "baichuan2-13b": LLAMA
    | {"hidden_size": 5120, "intermediate_size": 13696, "num_hidden_layers": 40,
       "num_attention_heads": 40, "vocab_size": 125696, "max_position_embeddings": 4096,
       "tie_word_embeddings": False},
    "llama2-7b": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
       "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
       "tie_word_embeddings": False},
    "llama2-70b": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
       "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000,
       "max_position_embeddings": 4096, "tie_word_embeddings": False},
    "qwen2.5-32b": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 5120,
        "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
        "num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 32768,
        "tie_word_embeddings": False},
    "starcoder": {
        "model_type": "gpt_bigcode", "architectures": ["GPTBigCodeForCausalLM"], "n_embd": 6144,
        "n_inner": 24576, "n_layer": 40, "n_head": 48, "n_positions": 8192, "vocab_size": 49156,
        "multi_query": True},
}  # fmt: skip
FULL = HandLayout(zero=3, micro_batch=1, checkpoint="full")
ZERO = "deepspeed-zero3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("configs")
    for name, config in CONFIGS.items():
        (made / name).mkdir()
        (made / name / "config.json").write_text(json.dumps(config))
    return made


def question(model: Path, gpus: int, gpu: str, **changes: object) -> Question:
    """One sample on each GPU."""
    plain = Question(model=str(model), num_gpus=gpus, gpu=gpu, global_batch=gpus, seq_len=4096)
    return replace(plain, **changes)  # type: ignore[arg-type]


def peak_gib(checked: Checked) -> float:
    return checked.peak_bytes / GIB


def states_bytes(checked: Checked) -> int:
    (stage,) = checked.plan.estimate.stages
    return stage.memory_parts_bytes["states"]


def usable_gib(checked: Checked) -> float:
    return checked.plan.estimate.stages[0].usable_bytes / GIB


def box(folder: Path, host_memory_bytes: float) -> str:
    """A server of PCIe cards with that much host memory."""
    rows = yaml.safe_load((PROFILES / "clusters" / "pcie-box.yaml").read_text())
    rows.pop("host_memory_by_device", None)
    rows["host_memory_bytes"]["value"] = host_memory_bytes
    path = folder / f"box-{host_memory_bytes / 1e9:.0f}.yaml"
    path.write_text(yaml.safe_dump(rows))
    return str(path)


@pytest.mark.slow
def test_torchtitan_533_five_samples_are_the_most_for_a_vocabulary_of_128k(folder: Path) -> None:
    """4 H100 of 96 GB, FSDP2, 8192 tokens: batch 5 reserved 81.67 GiB, 6 did not run."""

    def of(batch: int) -> Checked:
        asked = question(folder / "gpt2-sized", 4, "h100-sxm-500w-hbm2e", runtime="torchtitan")
        asked = replace(asked, global_batch=4 * batch, seq_len=8192)
        return check_layout(asked, HandLayout(zero=3, micro_batch=batch))

    five, six = of(5), of(6)
    logits = 8192 * 128256
    assert 81.67 == pytest.approx(peak_gib(five), rel=0.1)
    assert five.fits
    assert not six.fits
    assert six.peak_bytes - five.peak_bytes >= 12 * logits


@pytest.mark.slow
def test_s1_13_qwen_32b_under_fsdp1_on_cards_of_80_gb(folder: Path) -> None:
    """16 GPUs trained at 20,000 tokens; at 32,768 and on 8 GPUs memory was short."""

    def of(gpus: int, seq: int) -> Checked:
        asked = question(folder / "qwen2.5-32b", gpus, "h100-sxm", runtime="fsdp1", seq_len=seq)
        return check_layout(asked, FULL)

    ran = of(16, 20000)
    assert usable_gib(ran) > peak_gib(ran) > 0.85 * usable_gib(ran)
    # One micro-batch: no gradients at the loss, whose 12 bytes a logit are the peak.
    params = 32.76e9
    assert states_bytes(ran) == pytest.approx(12 * params / 16, rel=0.01)
    assert ran.peak_bytes > states_bytes(ran) + 12 * 20000 * 152064
    for short in (of(16, 32768), of(8, 20000)):
        assert peak_gib(short) > usable_gib(short)


@pytest.mark.slow
def test_llamafactory_1158_baichuan_13b_needs_zero_3_on_four_cards(folder: Path) -> None:
    """ZeRO-2 on 4 A800: 77.65 GiB allocated in the step, 12.94 more wanted; on 8 it runs."""

    def of(gpus: int, zero: int) -> Checked:
        asked = question(folder / "baichuan2-13b", gpus, "a100-sxm-80", runtime=ZERO, seq_len=1536)
        return check_layout(asked, replace(FULL, zero=zero))

    two, three, eight = of(4, 2), of(4, 3), of(8, 2)
    assert states_bytes(two) / GIB == pytest.approx(77.65, abs=0.05)
    overhead = 1.04  # the allocator's
    assert peak_gib(two) == pytest.approx(overhead * (77.65 + 12.94), rel=0.002)
    assert not two.fits
    assert any("--zero 3" in words for words in two.suggestions)
    assert three.fits
    assert eight.fits


@pytest.mark.slow
def test_deepspeed_4867_starcoder_does_not_fit_a_host_of_256_gb(folder: Path) -> None:
    """8 cards of 24 GB, optimizer on the host: 16 bytes a parameter, 1.5 times to be safe."""
    layout = replace(FULL, offload=Offload(optimizer=1.0))
    asked = question(folder / "starcoder", 8, "rtx-4090", runtime=ZERO, seq_len=1024)

    def of(host_memory_bytes: float) -> Checked:
        return check_layout(replace(asked, cluster=box(folder, host_memory_bytes)), layout)

    small, large = of(2.56e11), of(4e11)
    assert small.margin_bytes > 0  # the cards are large enough
    assert not small.fits
    (stage,) = small.plan.estimate.stages
    needed = 16 * 15.5e9
    assert needed < 8 * stage.host_bytes < 1.5 * needed
    assert large.fits


@pytest.mark.slow
def test_deepspeed_4571_a_host_of_31_gb_is_too_small_for_7_b(folder: Path) -> None:
    """One card of 24 GB with everything offloaded: killed, the host's memory was full."""
    layout = replace(FULL, offload=Offload(optimizer=1.0, weights=1.0))
    asked = question(folder / "llama2-7b", 1, "rtx-4090", runtime=ZERO, seq_len=1024)
    checked = check_layout(replace(asked, cluster=box(folder, 3.1e10)), layout)
    assert checked.margin_bytes > 0
    assert not checked.fits
    (stage,) = checked.plan.estimate.stages
    assert stage.host_bytes > 17 * 6.74e9


@pytest.mark.slow
def test_torchtune_389_llama2_7b_in_pure_bf16_on_one_card(folder: Path) -> None:
    """AdamW that makes no temporaries: about 54 GB, 8 bytes a parameter."""
    asked = question(folder / "llama2-7b", 1, "a100-sxm-80", runtime="torchtune", seq_len=512)
    checked = check_layout(asked, replace(FULL, zero=0))
    assert checked.fits
    assert checked.peak_bytes == pytest.approx(54e9, rel=0.06)
    assert states_bytes(checked) == pytest.approx(8 * 6.74e9, rel=0.001)


@pytest.mark.slow
def test_anyscale_130_llama2_70b_trains_on_32_a10g_with_offload(folder: Path) -> None:
    """ZeRO-3 with parameters and optimizer in host memory, 4096 tokens: it ran for 25 hours."""
    layout = replace(FULL, offload=Offload(optimizer=1.0, weights=1.0))
    checked = check_layout(question(folder / "llama2-70b", 32, "a10g", runtime=ZERO), layout)
    assert checked.fits
    assert states_bytes(checked) < 0.1 * GIB  # embedding and head, 2 bytes over 32 ranks
    (stage,) = checked.plan.estimate.stages
    assert 18 * 68.4e9 / 32 < stage.host_bytes < 1.5 * 18 * 69e9 / 32
