"""From columns to models and layouts, and what is refused by name."""

from dataclasses import replace

import pytest

from mist.plans.memory_levels import memory_of
from mist.plans.plan import Offload, even_layers, layers_by_cost
from mist.plans.workload import HeadMode, MemoryLevel
from mist.platform.profiles import find_calibration, load_device, load_runtime
from mist.validate.cases import grouped
from mist.validate.measured_runs import StageRun
from mist.validate.run_layouts import layout_of
from mist.validate.run_models import Unsupported, architecture_of
from mist.validate.sources import Source, load_source_ratios, load_sources
from tests.validate.rows import RUN, run

PLAIN = Source(runtime="torch", memory="reserved")
SIX = ((6, 0),)  # layers on one stage, none recomputed beyond what a run says


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"dp": None}, "dp not given"),
        ({"tp": None, "pp": None}, "tp, pp not given"),
        ({"ep": 8}, "expert parallelism is not modelled"),
        ({"zero_or_fsdp": "zero3+offload"}, "offloading of what is not said is not modelled"),
        ({"zero_or_fsdp": "zero3+offload(opt,nvme)"}, "offloading nvme is not modelled"),
        (
            {"zero_or_fsdp": "zero3+offload(act)", "tp": 1, "dp": 8},
            "runtime deepspeed-zero3 does not offload activations",
        ),
        ({"zero_or_fsdp": ""}, "the ZeRO level of '(blank)' is not known"),
        ({"activation_ckpt": "partial"}, "activation checkpointing 'partial' is not modelled"),
        ({"vocab": None}, "vocab not given"),
        ({"n_layers": 0, "seq_len": 0}, "n_layers, seq_len not given"),
        ({"grad_accum": 0, "global_batch": 0}, "neither grad_accum nor global_batch given"),
        ({"n_layers": 10**6}, "n_layers 1,000,000 is more than 65,536"),
        ({"dp": 10**15}, "dp 1,000,000,000,000,000 is more than 1,048,576"),
        ({"pp": 8}, "6 layers cannot fill 8 pipeline stages or chunks"),
        ({"pp": 2, "vpp": 4}, "6 layers cannot fill 8 pipeline stages or chunks"),
        ({"arch": "rnn"}, "architecture rnn is not known"),
        ({"gpu": "TPU"}, "GPU TPU has no profile"),
        ({"attention_impl": "magic"}, "attention 'magic' is not known"),
        ({"precision": "mxfp6"}, "precision mxfp6 is not modelled"),
        ({"precision": "nvfp4", "gpu": "H100-80GB-SXM"}, "GPU H100-80GB-SXM has no law for nvfp4"),
        ({"precision": "bf16+nf3-weights"}, "precision bf16+nf3-weights is not modelled"),
        ({"precision": "fp8", "gpu": "A100-80GB-SXM"}, "GPU A100-80GB-SXM has no law for fp8"),
        ({"task": "dpo"}, "task dpo is not modelled"),
        (
            {"activation_ckpt": "selective", "source": "hagemann23"},
            "selective checkpointing of runtime aleph is not known",
        ),
    ],
)
def test_a_run_that_is_not_predicted_says_why(columns: dict[str, object], reason: str) -> None:
    _, reasons = grouped([run(**columns)], load_sources(), calibrated=True)
    assert {name: str(why) for name, why in reasons.items()} == {"one": reason}


def test_a_source_can_say_why_none_of_its_runs_is_predicted() -> None:
    table = load_sources()
    told = Source(runtime="torch", memory="reserved", not_modelled="its rows leave much out")
    sources = replace(table, sources={"hand": told})
    groups, reasons = grouped([run()], sources, calibrated=True)
    assert (groups, str(reasons["one"])) == ((), "its rows leave much out")


def test_runs_of_one_model_are_predicted_together() -> None:
    runs = [run(run_id="a"), run(run_id="b", n_layers=12, dp=8), run(run_id="c", hidden=512)]
    groups, reasons = grouped(runs, load_sources(), calibrated=True)
    assert reasons == {}
    assert sorted(len(group.members) for group in groups) == [1, 2]
    # No table has the source: its tensor parallelism under ZeRO-1 is Megatron's.
    assert {group.machine.runtime.name for group in groups} == {"megatron"}
    assert all(group.calibrated for group in groups)


@pytest.mark.parametrize(
    ("text", "zero"),
    [("none", 0), ("ddp+dist-optimizer(zero1)", 1), ("fsdp2-full", 3), ("hsdp", 3), ("zero2", 2)],
)
def test_zero_levels(text: str, zero: int) -> None:
    layout = layout_of(run(zero_or_fsdp=text), PLAIN, SIX)
    assert layout.stages[0].zero == zero


@pytest.mark.parametrize(
    ("text", "hosted"),
    [
        ("zero2", Offload()),
        ("zero2+offload(opt)", Offload(optimizer=1.0)),
        ("zero3+offload(opt,param)", Offload(optimizer=1.0, weights=1.0)),
        ("fsdp2-full+offload(act)", Offload(activations=1.0)),
    ],
)
def test_offloaded_states_are_named_in_the_words_of_zero(text: str, hosted: Offload) -> None:
    layout = layout_of(run(zero_or_fsdp=text), PLAIN, SIX)
    assert layout.stages[0].offload == hosted


def test_a_source_says_what_all_of_its_runs_offload_and_how_their_loss_runs() -> None:
    """ml-engineering: DeepSpeed's CPU AdamW and Liger's loss, in its notes."""
    one = run(source="ml-engineering", zero_or_fsdp="zero3", tp=1, dp=8)
    (group,), _ = grouped([one], load_sources(), calibrated=False)
    (stage,) = group.members[0].case.layout.stages
    assert (stage.offload, group.key.setting.head) == (Offload(optimizer=1.0), HeadMode.IN_FORWARD)


def test_a_source_says_which_kernel_its_word_of_attention_means() -> None:
    """Transformer Engine's on Blackwell is cuDNN's; simumax calls it flash."""
    row = run(source="simumax-b200", gpu="B200-180GB-SXM", attention_impl="flash")
    (group,), _ = grouped([row], load_sources(), calibrated=False)
    (plain,), _ = grouped([replace(row, source="megatron-lm-ci")], load_sources(), calibrated=False)
    scale = [each.machine.runtime.kernels.attention_time_scale.value for each in (group, plain)]
    assert scale == [0.36, 1.0]


def test_what_a_run_does_not_say_the_source_does() -> None:
    source = replace(PLAIN, zero=1, checkpoint="full")
    layout = layout_of(run(zero_or_fsdp="", activation_ckpt=""), source, SIX)
    (stage,) = layout.stages
    assert (stage.zero, stage.memory) == (1, memory_of(6, MemoryLevel.FULL))


def test_micro_batches_follow_from_the_global_batch() -> None:
    layout = layout_of(run(grad_accum=None), PLAIN, SIX)
    assert layout.num_micro_batches == 32 // (4 * 2)


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ({}, "llama"),
        ({"arch": "dense-gpt"}, "gpt2"),
        ({"arch": "dense", "ffn_hidden": 1024, "n_kv_heads": 8}, "gpt2"),
        ({"arch": "dense"}, "llama"),
        ({"arch": "dense-bert"}, "bert"),
        ({"arch": "dense-qwen3"}, "qwen3"),
        ({"arch": "moe:128e-top8,moe_ffn=768"}, "mixtral"),
    ],
)
def test_models(columns: dict[str, object], kind: str) -> None:
    found = architecture_of(run(**columns), dropout=False)
    assert found.config.config["model_type"] == kind
    assert found.layers == RUN.n_layers


def test_heads_of_qwen3_are_128_wide() -> None:
    """Qwen3-32B has 32.76 B parameters; heads of hidden / heads = 80 would give 30.5 B."""
    shape = {"hidden": 5120, "n_layers": 64, "n_heads": 64, "n_kv_heads": 8, "ffn_hidden": 25600}
    made = architecture_of(run(arch="dense-qwen3", vocab=151936, **shape), dropout=False)
    fields = made.config.config
    heads = fields["num_attention_heads"] + fields["num_key_value_heads"]
    layer = 2 * fields["hidden_size"] * heads * fields["head_dim"] + 3 * 5120 * 25600
    assert (64 * layer + 2 * 5120 * 151936) / 1e9 == pytest.approx(32.76, rel=1e-3)


def test_an_embedding_is_tied_where_parameters_say_so() -> None:
    body, table = 6 * (2 * 256**2 + 2 * 256 * 128 + 3 * 256 * 512), 256 * 1024
    for tables in (1, 2):
        found = architecture_of(run(params_b=(body + tables * table) / 1e9), dropout=False)
        assert found.config.config["tie_word_embeddings"] == (tables == 1)


def test_layers_are_dealt_out_evenly_or_by_cost() -> None:
    assert even_layers(10, 4) == (3, 3, 2, 2)
    # nanotron: a head of four layers' cost leaves the last stage fewer of 16.
    assert layers_by_cost(16, 4, layer_cost=1.0, ends=(0.0, 4.0)) == (5, 5, 5, 1)
    for stages in (1, 2, 3, 8):
        assert sum(layers_by_cost(28, stages, layer_cost=1.0, ends=(0.0, 3.5))) == 28


def test_an_unknown_field_is_unsupported() -> None:
    with pytest.raises(Unsupported):
        architecture_of(run(hidden=None), dropout=False)


def test_given_stages_stand_for_even_ones() -> None:
    rows = tuple(
        StageRun(run_id="one", stage=i, layers=n, checkpointed_layers=i)
        for i, n in enumerate((4, 2))
    )
    piped = run(pp=2, dp=2, activation_ckpt="partial")
    (group,), _ = grouped([piped], load_sources(), calibrated=True, stages={"one": rows})
    layout = group.members[0].case.layout
    assert [(s.num_layers, s.num_full) for s in layout.stages] == [(4, 0), (2, 1)]
    _, reasons = grouped([run(pp=1)], load_sources(), calibrated=True, stages={"one": rows})
    assert str(reasons["one"]) == "stages of 4 + 2 layers are not the 6 layers on 1 stages"


@pytest.mark.parametrize(
    ("printed", "layers"),
    # 1 + share / 3 is HFU / MFU: all layers again is 4/3, half of them 7/6; nothing printed: 0.39.
    [({"mfu": 45.0, "hfu": 60.0}, 6), ({"mfu": 60.0, "hfu": 70.0}, 3), ({}, 2)],
)
def test_selective_may_be_a_share_of_whole_layers(printed: dict[str, object], layers: int) -> None:
    one = run(source="fms-fsdp-eager", zero_or_fsdp="fsdp1-full", activation_ckpt="selective",
              **printed)  # fmt: skip
    (group,), _ = grouped([one], load_sources(), calibrated=False)
    (stage,) = group.members[0].case.layout.stages
    assert stage.num_full == layers


def test_a_source_says_what_its_network_and_its_words_are() -> None:
    table = load_sources()
    (fms,), _ = grouped([run(source="fms-fsdp-eager")], table, calibrated=True)
    source, network = table.sources["fms-fsdp-eager"], fms.machine.cluster.network
    assert network.nic_bytes_per_s.value == 800e9 / 8 / 8  # 800 Gb/s for eight GPUs
    calibration, ratios = (
        find_calibration("torch", load_device("h100-sxm").profile),
        load_source_ratios(),
    )
    assert calibration is not None
    path = "cluster.network.efficiency_ratio"
    known = calibration.profile.values[path].value
    assert network.efficiency_ratio.value == known * ratios.ratios["fms-fsdp-eager"][path]
    assert fms.machine.runtime.traffic.reduced_bytes_per_param == source.reduced_bytes_per_param
    (plain,), _ = grouped([run(source="fms-fsdp-eager")], table, calibrated=False)
    assert plain.machine.cluster.network.efficiency_ratio.value == 0.85
    (titan,), _ = grouped([run(source="torchtitan-log")], table, calibrated=True)
    selective = load_runtime("torchtitan").profile.selective
    assert (titan.machine.runtime.name, titan.machine.runtime.selective) == ("torch", selective)
