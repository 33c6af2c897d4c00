"""The command line: what is printed and written, and the exact words and exit code of a refusal."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from mist import cli
from mist.cli import plan_commands as planning
from mist.plans.file import load_plan
from mist.plans.memory_chance import sure_margin
from mist.plans.plan import Offload, Plan, Schedule
from mist.plans.workload import ScheduleKind
from mist.platform.overrides import HOST_MEMORY
from tests.platform.samples import other_one

ROOT = Path(__file__).parents[1]
SMALL = ("--gpus", "4", "--global-batch", "16")
QUICK = (*SMALL, "--space", "3d")  # where any plan will do


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a command returned and printed."""

    code: object
    out: str
    err: str

    @property
    def message(self) -> str:
        """What followed "mist: " on stderr."""
        return self.err[self.err.index("mist: ") + len("mist: ") :].rstrip("\n")


Mist = Callable[..., Run]


@pytest.fixture
def mist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Mist:
    """Runs a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["mist", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr()
        return Run(code=end.value.code, out=printed.out, err=printed.err)

    return run


def test_a_plan_is_written_and_told(mist: Mist, models: Path, tmp_path: Path) -> None:
    run = mist("plan", models / "tiny.py", *SMALL, "--details")
    assert run.code == 0
    plan = load_plan(tmp_path / "tiny-4xh100-sxm.yaml")
    assert (tmp_path / "tiny-4xh100-sxm.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {
        "tiny-4xh100-sxm.yaml",
        "tiny-4xh100-sxm.png",
    }
    assert plan.model.source == str(models / "tiny.py")
    assert len(plan.alternatives) == 5
    for words in (
        "Stages (",
        "Memory per GPU",
        "tokens/s, MFU ",
        *[a.layout.partition(",")[0] for a in plan.alternatives],  # the rest may wrap
    ):
        assert words in run.out
    assert "a line that the model's file prints" not in run.out
    assert "\nWrote tiny-4xh100-sxm.yaml and tiny-4xh100-sxm.png.\n" in run.out


@pytest.mark.slow
def test_the_same_plan_twice_has_the_same_bytes(mist: Mist, models: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        mist("plan", models / "tiny.py", *SMALL, "--out", f"{name}.yaml")
    for kind in (".yaml", ".png"):
        files = [(tmp_path / name).with_suffix(kind) for name in ("first", "second")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_the_json_of_a_plan_is_all_of_stdout(mist: Mist, models: Path, tmp_path: Path) -> None:
    run = mist("plan", models / "tiny.py", *SMALL, "--json", "--top", 2, "--out", "p.yaml")
    found = json.loads(run.out)
    written = yaml.safe_load((tmp_path / "p.yaml").read_text())
    assert {key: found[key] for key in written} == written
    assert {*found} - {*written} == {
        "fit_probability", "host_memory", "seconds", "notes", "candidates"
    }  # fmt: skip
    assert len(found["alternatives"]) == 2
    assert {*found["seconds"]} == {"prepare", "search"}


@pytest.mark.slow
def test_several_numbers_of_gpus(mist: Mist, models: Path, tmp_path: Path) -> None:
    asked = ("plan", models / "tiny.py", "--gpus", "2,4", "--global-batch", 16, "--space", "3d")
    run = mist(*asked, "--objective", "tokens-per-dollar", "--price", 2.5, "--tokens", 1e9)
    assert run.code == 0
    assert "Prices per GPU hour: dgx-h100 $2.5 (--price)." in run.out
    (path,) = tmp_path.glob("*.yaml")
    assert (tmp_path / f"{path.stem}-candidates.png").read_bytes().startswith(b"\x89PNG")
    assert run.out.endswith(
        f"\nWrote {path.name} and {path.stem}.png and {path.stem}-candidates.png.\n"
    )
    rows = json.loads(mist(*asked, "--price", 2.5, "--json").out)["candidates"]
    low, high = min(r["step_low_ratio"] for r in rows), max(r["step_high_ratio"] for r in rows)
    assert f"Candidates (predicted, {low - 1:+.0%} to {high - 1:+.0%}, calibrated)" in run.out
    assert [row["num_gpus"] for row in rows] == [2, 4]
    assert [row["chosen"] for row in rows].count(True) == 1
    best = next(row for row in rows if row["chosen"])
    assert best["tokens_per_s"] == max(row["tokens_per_s"] for row in rows)


@pytest.mark.slow
def test_what_is_set_is_kept(mist: Mist, models: Path, tmp_path: Path) -> None:
    knobs = ("tp=2", "pp=2", "dp=1", "micro-batch=2", "zero=1", "checkpoint=full")
    options = [word for knob in knobs for word in ("--set", knob)]
    run = mist("plan", models / "tiny.py", *SMALL, *options, "--out", "p.yaml")
    assert run.code == 0, run.err
    plan = load_plan(tmp_path / "p.yaml")
    assert [(s.tp, s.dp, s.micro_batch, s.zero, s.num_full) for s in plan.stages] == [
        (2, 1, 2, 1, 2)
    ] * 2
    assert plan.provenance.search["restricted"] == ", ".join(knobs)


def planned(mist: Mist, models: Path, *options: object) -> tuple[Run, Plan]:
    """A plan of the tiny model, and what was printed."""
    run = mist("plan", models / "tiny.py", *SMALL, *options, "--out", "p.yaml")
    assert run.code == 0, run.err
    return run, load_plan("p.yaml")


@pytest.mark.slow
def test_own_figures_are_kept_by_the_plan_and_used_again(mist: Mist, models: Path) -> None:
    own = ("--set", "device.memory_bytes=4GB", "--set", "runtime.memory.margin_ratio=0.2")
    run = mist("check", models / "tiny.py", *SMALL, *own, "--out", "own.yaml")
    words = "your own figures: device.memory_bytes 3.7 GiB, runtime.memory.margin_ratio 0.2\n"
    assert words in run.out
    assert load_plan("own.yaml").overrides == {
        "device.memory_bytes": 4e9,
        "runtime.memory.margin_ratio": 0.2,
    }
    # 4 GB less 1 GiB of context, less a fifth; and of 3 GB asked of the same plan.
    for more, total in (((), 4e9), (("--set", "device.memory_bytes=3GB"), 3e9)):
        found = json.loads(mist("check", "own.yaml", "--trust", *more, "--json").out)
        assert found["limit_bytes"] == round((total - 2**30) * 0.8)
        assert found["overrides"]["device.memory_bytes"] == total
    planned = json.loads(mist("plan", models / "tiny.py", *SMALL, *own, "--json").out)
    assert planned["overrides"] == found["overrides"] | {"device.memory_bytes": 4e9}


def test_a_space_and_what_narrows_it(mist: Mist, models: Path) -> None:
    """Megatron without interleaving, at most two GPUs by tp and one by pp: only tp2 dp2 is left."""
    options = ("--space", "megatron", "--set", "tp=2", "--max", "pp=1", "--forbid", "interleaved")
    run, plan = planned(mist, models, *options, "--details")
    (stage,) = plan.stages
    assert (stage.tp, stage.dp) == (2, 2)
    assert stage.zero in (0, 1)
    assert plan.provenance.search["restricted"] == (
        "space megatron, tp=2, max pp=1, no interleaved"
    )
    assert "solver: none: every layout of like stages was judged" in " ".join(run.out.split())


@pytest.mark.slow
def test_each_space_plans(mist: Mist, models: Path) -> None:
    """What a space forbids is in no plan of it, and no larger space is slower."""
    steps = {}
    for name in ("3d", "aceso", "fsdp", "deepspeed", "paper", "mist"):
        options = ("--space", name, "--max", "micro-batch=1", "--objective", "nominal")
        _, plan = planned(mist, models, *options)
        steps[name] = plan.estimate.step_s
        told = "max micro-batch=1" if name == "mist" else f"space {name}, max micro-batch=1"
        assert plan.provenance.search["restricted"] == told
        assert {stage.micro_batch for stage in plan.stages} == {1}
        if name in ("fsdp", "deepspeed"):
            assert len(plan.stages) == 1
        if name == "fsdp":
            assert [(stage.tp, stage.zero > 1) for stage in plan.stages] == [(1, True)]
        if name not in ("deepspeed", "paper", "mist"):
            assert {stage.offload for stage in plan.stages} == {Offload()}
    assert steps["mist"] <= min(steps.values())
    assert steps["aceso"] <= steps["3d"]


@pytest.mark.slow
def test_one_solver_and_no_time(mist: Mist, models: Path) -> None:
    run, plan = planned(mist, models, "--solver", "dp", "--time-limit", 0, "--details")
    assert plan.provenance.solver == "dynamic program"
    assert plan.provenance.search["groups_left"] > 0
    whole = planned(mist, models)[1]
    assert plan.provenance.lower_bound_s <= whole.estimate.step_s <= plan.estimate.step_s
    assert f"solver: dynamic program; optimality gap {plan.provenance.gap:.2g} of the step." in (
        " ".join(run.out.split())
    )


@pytest.mark.slow
def test_a_schedule_that_is_set_is_planned_and_checked(mist: Mist, models: Path) -> None:
    for kind in ScheduleKind:
        options = ("--set", "pp=2", "--set", f"schedule={kind}", "--objective", "nominal")
        _, plan = planned(mist, models, *options)
        assert plan.schedule.kind is kind
        assert (plan.schedule.vpp > 1) is (kind is ScheduleKind.INTERLEAVED)
        checked = json.loads(mist("check", "p.yaml", "--trust", "--json").out)
        assert checked["step_s"] == plan.estimate.step_s
        assert checked["fits"]


@pytest.mark.slow
def test_a_model_without_layers_is_one_stage_with_a_note(mist: Mist, models: Path) -> None:
    note = "no list of layers that are called once each in order: one block, one layer"
    run = mist("plan", models / "flat.py", *SMALL, "--seq", 128, "--out", "flat.yaml")
    assert run.code == 0, run.err
    assert f"Note: {note}.\n" in run.out
    assert len(load_plan("flat.yaml").stages) == 1
    assert f"Note: {note}.\n" in mist("check", "flat.yaml", "--trust").out
    assert note in json.loads(mist("check", "flat.yaml", "--trust", "--json").out)["notes"]


def test_check_judges_a_layout_and_writes_it(mist: Mist, models: Path) -> None:
    layout = ("--tp", 2, "--pp", 2, "--zero", 1, "--micro-batch", 1, "--checkpoint", "full")
    machines = ("--gpu", "h100-sxm", "--cluster", "dgx-h100")
    run = mist("check", models / "tiny.py", *SMALL, *machines, *layout, "--out", "mine.yaml")
    assert run.code == 0, run.err
    assert run.out.startswith("FITS, with ")
    assert run.out.endswith("\nWrote mine.yaml.\n")
    plan = load_plan("mine.yaml")
    assert [(stage.tp, stage.zero, stage.num_full) for stage in plan.stages] == [(2, 1, 2)] * 2
    again = mist("check", "mine.yaml", "--trust")
    assert again.code == 0
    # A plan file has no suggestions: its stages may differ.
    assert again.out == "".join(
        line
        for line in run.out.splitlines(keepends=True)
        if not line.startswith(("Try ", "Wrote "))
    )


def test_the_json_of_a_check(mist: Mist, models: Path) -> None:
    mist("plan", models / "tiny.py", *QUICK, "--out", "p.yaml")
    run = mist("check", "p.yaml", "--trust", "--json")
    found = json.loads(run.out)
    assert found["fits"] is True
    assert {"margin_bytes", "step_s", "stages"} <= {*found}
    for stage in found["stages"]:
        assert stage["usable_bytes"] > found["limit_bytes"] >= stage["peak_bytes"]
        # Seven figures, each rounded to a whole byte.
        assert sum(stage["parts"].values()) == pytest.approx(stage["peak_bytes"], abs=4)


@pytest.mark.slow
def test_a_check_that_fails(mist: Mist, models: Path) -> None:
    run = mist("check", models / "tiny.py", *SMALL, "--micro-batch", 4, "--margin", 0.99999)
    assert run.code == 3
    assert run.out.startswith("DOES NOT FIT: over by ")
    run = mist("check", models / "tiny.py", *SMALL, "--margin", 0.99999, "--json")
    assert run.code == 3
    assert json.loads(run.out)["fits"] is False


def test_check_judges_chunks_and_offloads_and_the_file_keeps_them(mist: Mist, models: Path) -> None:
    chunks = ("--pp", 2, "--schedule", "interleaved", "--vpp", 2)
    away = ("--zero", 2, "--offload", "optimizer=0.5", "--offload", "activations=1")
    run = mist("check", models / "tiny.py", *SMALL, *chunks, *away, "--out", "mine.yaml")
    assert run.code == 0, run.err
    text = " ".join(run.out.split())
    assert "schedule interleaved, 2 chunks per stage" in text
    assert text.count("optimizer 50%, activations 100%") == 1  # two stages, alike
    assert "Host memory: " in text
    plan = load_plan("mine.yaml")
    assert plan.schedule == Schedule(kind=ScheduleKind.INTERLEAVED, vpp=2)
    assert [stage.layers for stage in plan.stages] == [((0, 1), (2, 1)), ((1, 1), (3, 1))]
    assert {s.offload for s in plan.stages} == {Offload(optimizer=0.5, activations=1.0)}
    mist("check", "mine.yaml", "--trust", "--out", "again.yaml")
    assert load_plan("again.yaml") == plan


def test_check_judges_a_stated_split_and_the_file_keeps_it(mist: Mist, models: Path) -> None:
    split = ("--pp", 2, "--layers", "1,3", "--out", "mine.yaml")
    run = mist("check", models / "tiny.py", *SMALL, *split)
    assert run.code == 0, run.err
    assert [stage.layers for stage in load_plan("mine.yaml").stages] == [((0, 1),), ((1, 3),)]
    assert mist("check", "mine.yaml", "--trust").code == 0
    run = mist("check", models / "tiny.py", *SMALL, "--pp", 2, "--layers", "two,2")
    assert run.code == 2
    assert run.message == (
        "--layers two,2: expected whole numbers with commas between them (8,8,7)."
    )
    assert "--layers" in mist("check", "mine.yaml", "--layers", "1,3").message


LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 128, "vocab_size": 256, "max_position_embeddings": 1024,
}  # fmt: skip


def test_a_configuration_is_called_after_its_file_and_says_its_positions(
    mist: Mist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a minute of tracing: what traces is not there."""
    monkeypatch.setattr("mist.symbolic.load_programs.load_graph", None)
    (tmp_path / "small-llama.json").write_text(json.dumps(LLAMA))
    folder = tmp_path / "Tiny-Llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA | {"max_position_embeddings": 512}))
    hint = "or a model with more: max_position_embeddings of a config.json can be raised."
    for model, name, longest in (("small-llama.json", "small-llama", 1024),
                                 ("Tiny-Llama", "tiny-llama", 512),
                                 ("Tiny-Llama/config.json", "tiny-llama", 512)):  # fmt: skip
        for command in (("plan",), ("check", "--micro-batch", 4)):
            run = mist(command[0], model, *SMALL, "--seq", 2048, *command[1:])
            assert run.code == 2
            assert run.message == (
                f"--seq 2048: {name} has positions for {longest} tokens. "
                f"Use --seq {longest} or less, {hint}"
            )


@pytest.mark.parametrize("command", ["plan", "check"])
def test_help_says_where_profiles_are_listed(mist: Mist, command: str) -> None:
    words = " ".join(mist(command, "--help").out.split())
    for option in ("--gpu", "--cluster", "--runtime"):
        told = words[words.index(f"{option} ") :]
        assert "mist profiles lists them" in told[:160]


def test_a_host_without_room_is_no_fit(mist: Mist, models: Path) -> None:
    """The optimizer of 326 K parameters is 8 bytes of each, on a host with room for a tenth.

    Each of 4 ranks holds it, and draws the largest module (64 * 1000 numbers of fp32) beside it.
    """
    layout = ("--host-memory", "0.0013GB", "--offload", "optimizer=1")
    run = mist("check", models / "tiny.py", *SMALL, *layout)
    assert run.code == 3
    lines = run.out.splitlines()
    assert lines[0] == (
        "DOES NOT FIT in host memory: needs 10.9 MiB per node while weights are drawn, of the "
        "1.1 MiB that a plan may use, over by 9.9 MiB."
    )
    assert lines[1].startswith("Fits on the GPU, with ")
    assert any(line.startswith("Try --offload optimizer=0: ") for line in lines)
    found = json.loads(mist("check", models / "tiny.py", *SMALL, *layout, "--json").out)
    assert found["fits"] is False
    assert found["margin_bytes"] > 0
    # Four layers of attention, MLP with biases and a norm; embedding and head.
    params = 4 * (4 * 64 * 64 + 2 * 64 * 256 + 256 + 64 + 128) + 2 * 1000 * 64
    held = 8 * params
    assert found["stages"][0]["host_bytes"] == held
    assert found["host_limit_bytes"] == round(1.3e6 * (1 - sure_margin(0.1)) / 4)
    host = found["host_memory"]
    drawn = 4 * 1000 * 64
    assert (host["held_bytes"], host["drawn_bytes"]) == (4 * held, drawn)
    assert host["loading_bytes"] == host["needed_bytes"] == 4 * (held + drawn)
    assert (host["memory_bytes"], host["kind"]) == (1_300_000, "given")
    plain = ("check", models / "tiny.py", *SMALL)
    assert mist(*plain, "--host-memory", "0.0001GB").code == 3  # the draws alone
    assert mist(*plain, "--host-memory", "0.0013GB").code == 0  # 4 * 256 KB = 0.858 * 1.19 MB


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("31", "expected a number with GB, GiB, TB or TiB. Try 64GB."),
        ("nonsense", "expected a number with GB, GiB, TB or TiB. Try 64GB."),
        ("-31GB", "expected a number with GB, GiB, TB or TiB. Try 64GB."),
        ("0GB", "expected more than zero and at most 1000 TB. Try 64GB."),
        ("5000TB", "expected more than zero and at most 1000 TB. Try 64GB."),
    ],
)
@pytest.mark.parametrize("command", ["plan", "check"])
def test_sizes_of_host_memory_that_are_none(
    mist: Mist, models: Path, command: str, size: str, message: str
) -> None:
    run = mist(command, models / "tiny.py", *SMALL, "--host-memory", size)
    assert (run.code, run.out) == (2, "")
    assert run.err == f"mist: --host-memory {size}: {message}\n"


def test_a_plan_keeps_the_host_memory_it_was_made_for(mist: Mist, models: Path) -> None:
    """`check PLAN` judges by it, unless told another; a plan for the cluster's own has no key."""
    layout = (models / "tiny.py", *SMALL, "--offload", "optimizer=1")
    assert mist("check", *layout, "--host-memory", "0.02GB", "--out", "given.yaml").code == 0
    assert load_plan("given.yaml").overrides[HOST_MEMORY] == 20_000_000
    run = mist("check", "given.yaml", "--trust", "--json")
    assert run.code == 0
    assert json.loads(run.out)["host_memory"]["memory_bytes"] == 20_000_000
    less = mist("check", "given.yaml", "--trust", "--host-memory", "0.001GB", "--out", "less.yaml")
    assert less.code == 3
    assert less.out.startswith("DOES NOT FIT in host memory: needs 10.9 MiB per node")
    assert load_plan("less.yaml").overrides[HOST_MEMORY] == 1_000_000
    assert mist("check", "less.yaml", "--trust").code == 3
    mist("check", *layout, "--out", "plain.yaml")
    assert "host_memory" not in Path("plain.yaml").read_text()


@pytest.mark.slow
def test_a_check_without_a_trace_traces_and_says_so(
    mist: Mist, models: Path, tmp_path: Path
) -> None:
    fresh = tmp_path / "fresh.py"
    fresh.write_text((models / "tiny.py").read_text())
    run = mist("check", "fresh.py", *SMALL)
    assert "loading fresh.py\n" in run.err
    assert "tracing" in run.err
    assert mist("check", "fresh.py", *SMALL).err == "fresh: trace from the cache\n"


def test_the_costs_of_blocks_at_a_point(mist: Mist, models: Path) -> None:
    at = ("--at", "b=2,s=128,t=2", "--precision", "fp32", "--json")
    blocks = json.loads(mist("trace", models / "tiny.py", *at).out)["blocks"]
    assert [(block["name"], block["repeat"]) for block in blocks] == [
        ("embed", 1),
        ("Layer", 4),
        ("head", 1),
    ]
    for block in blocks:
        assert {
            "name",
            "repeat",
            "param_bytes",
            "flop_forward",
            "flop_backward",
            "saved_bytes",
            "boundary_bytes",
        } <= {*block}
    # fp32, t = 2: attention 4 * 64 * 64 and MLP 2 * 64 * 256 halved, MLP biases 256 / 2 + 64,
    # LayerNorm 2 * 64; boundary b * s * 64.
    assert blocks[1]["param_bytes"] == 4 * ((4 * 64 * 64 + 2 * 64 * 256) // 2 + 128 + 64 + 128)
    assert blocks[1]["boundary_bytes"] == 4 * 2 * 128 * 64
    # Matrices: 2 * tokens * weights / t; attention: 2 products of 2 * b * heads * s * s * 16 / t.
    matrices = 2 * 256 * (4 * 64 * 64 + 2 * 64 * 256) // 2
    assert blocks[1]["flop_forward"] == matrices + 2 * (2 * 2 * 4 * 128 * 128 * 16) // 2


def test_the_costs_of_blocks_as_expressions(mist: Mist, models: Path) -> None:
    run = mist("trace", models / "tiny.py")
    assert run.code == 0
    assert "b micro-batch, s sequence, t tensor-parallel degree" in run.out
    assert "128*b*s" in run.out  # the boundary: 64 elements of 2 bytes


def test_profiles_are_listed_and_shown(mist: Mist) -> None:
    found = json.loads(mist("profiles", "--json").out)["profiles"]
    names = {profile["name"] for profile in found}
    assert {"h100-sxm", "h200", "a100-sxm-80", "a100-sxm-40", "b200", "l4", "l40s"} <= names
    assert {"dgx-h100", "dgx-a100", "pcie-box", "l4-box", "local-cpu", "torch"} <= names
    shown = mist("profiles", "show", "l4")
    assert shown.code == 0
    assert "device l4: " in shown.out
    assert "device h200" not in shown.out


REFUSED: list[tuple[str, tuple[str, ...], str]] = [
    (
        "fp16 under torch",
        ("plan", "{models}/raising.py", *SMALL, "--precision", "fp16"),
        "--precision fp16: runtime torch trains in bf16 and fp32 (it scales no losses, which fp16 "
        "needs). Try --precision bf16.",
    ),
    (
        "fp16 under torch, a layout",
        ("check", "{models}/raising.py", "--gpus", "2", "--precision", "fp16"),
        "--precision fp16: runtime torch trains in bf16 and fp32 (it scales no losses, which fp16 "
        "needs). Try --precision bf16.",
    ),
    (
        "zero bubble with selective layers",
        (
            "plan",
            "{models}/tiny.py",
            "--gpus",
            "2",
            "--seq",
            "512",
            "--global-batch",
            "8",
            "--set",
            "schedule=zero-bubble",
            "--set",
            "pp=2",
            "--set",
            "checkpoint=selective",
        ),
        "Nothing can run with schedule=zero-bubble, pp=2, checkpoint=selective: "
        "zero-bubble splits the backward pass: "
        "torch runs a selective layer backward once only, and a full one forward again for each of "
        "its weights; use checkpoint none, or 1f1b.",
    ),
    (
        "stages that Megatron does not deal out",
        (
            "plan",
            "{models}/tiny.py",
            "--gpus",
            "3",
            "--global-batch",
            "9",
            "--runtime",
            "megatron",
            "--set",
            "pp=3",
        ),
        "Nothing can run with pp=3: "
        "runtime megatron does not deal 4 layers out to 3 stages by itself.",
    ),
    (
        "file missing",
        ("plan", "missing.py", *SMALL),
        "model 'missing.py' is neither a file, a folder with a config.json, nor a preset. ...",
    ),
    (
        "raises on import",
        ("plan", "{models}/raising.py", *SMALL),
        "{models}/raising.py cannot be imported: RuntimeError: the disk is full "
        "(line 3: raise RuntimeError('the disk is full')).",
    ),
    (
        "ends the program on import",
        ("plan", "{models}/leaving.py", *SMALL),
        "{models}/leaving.py cannot be imported: SystemExit: 0 (line 3: sys.exit(0)).",
    ),
    (
        "no build_model",
        ("plan", "{models}/empty.py", *SMALL),
        "{models}/empty.py defines neither build_model() nor model. "
        "Add a function build_model() that returns the torch.nn.Module to plan.",
    ),
    (
        "returns something else",
        ("plan", "{models}/number.py", *SMALL),
        "{models}/number.py: build_model() returned an int, not a torch.nn.Module. "
        "Return the module itself.",
    ),
    (
        "build_model fails",
        ("plan", "{models}/failing.py", *SMALL),
        "{models}/failing.py: build_model() raised KeyError: 'layers' "
        "(line 2: return {}['layers']).",
    ),
    (
        "data-dependent control flow",
        ("plan", "{models}/branching.py", *SMALL),
        "branching decides by the values of its tensors "
        "({models}/branching.py:12: if x.sum() > 0:). Mist traces shapes only: "
        "replace the branch or .item() by an operation on tensors, such as torch.where.",
    ),
    (
        "unknown preset",
        ("plan", "lama3-8b", *SMALL),
        "model 'lama3-8b' is neither a file, a folder with a config.json, nor a preset. "
        "Did you mean llama3-8b...",
    ),
    (
        "unknown GPU",
        ("plan", "{models}/tiny.py", *SMALL, "--gpu", "h10"),
        "--gpu h10: no device of that name. Did you mean h20 or h200 or h100-sxm? "
        f"{other_one('device')}",
    ),
    (
        "unknown cluster",
        ("plan", "{models}/tiny.py", *SMALL, "--cluster", "dgx-h10"),
        "--cluster dgx-h10: no cluster of that name. Did you mean dgx-h100 or dgx-h200 or "
        f"hgx-h20? {other_one('cluster')}",
    ),
    (
        "unknown runtime",
        ("plan", "{models}/tiny.py", *SMALL, "--runtime", "troch"),
        "--runtime troch: no runtime of that name. Did you mean torch or torchtune or torchtitan? "
        f"{other_one('runtime')}",
    ),
    (
        "no GPUs",
        ("plan", "{models}/tiny.py", "--gpus", "0"),
        "--gpus 0: a plan needs at least one GPU. Try --gpus 8.",
    ),
    (
        "GPUs that are no number",
        ("plan", "{models}/tiny.py", "--gpus", "many"),
        "--gpus many: expected a number (16), a list (8,16,24) or a range (8..64).",
    ),
    (
        "an objective without a price",
        ("plan", "{models}/tiny.py", *SMALL, "--objective", "tokens-per-dollar"),
        "--objective tokens-per-dollar: no price for dgx-h100. Give --price USD per GPU hour, or "
        "set price_per_gpu_hour_usd: {value, source, kind} in the cluster's YAML.",
    ),
    (
        "negative GPUs",
        ("plan", "{models}/tiny.py", "--gpus", "-1"),
        "--gpus -1: a plan needs at least one GPU. Try --gpus 8.",
    ),
    (
        "GPUs that fill no nodes",
        ("plan", "{models}/tiny.py", "--gpus", "17"),
        "--gpus 17: dgx-h100 has 8 GPUs per node, so a job takes at most 8 GPUs or a multiple "
        "of 8. Try --gpus 16 or 24.",
    ),
    (
        "a batch that nothing factorises",
        ("plan", "{models}/tiny.py", "--gpus", "8", "--global-batch", "7", "--set", "tp=1"),
        "--global-batch 7: no (dp, micro-batch, micro-batches) factorises it on 8 GPUs "
        "with tp=1. Try --global-batch 8.",
    ),
    (
        "tp that does not divide the heads",
        ("plan", "{models}/tiny.py", "--gpus", "3", "--global-batch", "12", "--set", "tp=3"),
        "tp 3 does not divide the sequence of 512 tokens, which runtime torch shards with it. "
        "tp 3 does not divide the 4 attention heads of tiny. "
        "tp 3 does not divide the 256 MLP width of tiny.",
    ),
    (
        "check with tp that does not divide the heads",
        ("check", "{models}/tiny.py", "--gpus", "3", "--global-batch", "12", "--tp", "3"),
        "tp 3 does not divide the sequence of 512 tokens, which runtime torch shards with it.\n"
        "tp 3 does not divide the 4 attention heads of tiny.\n"
        "tp 3 does not divide the 256 MLP width of tiny.",
    ),
    (
        "longer than the positions",
        ("plan", "{models}/tiny.py", *SMALL, "--seq", "513"),
        "--seq 513: tiny has positions for 512 tokens. Use --seq 512 or less, or a model with "
        "more: max_position_embeddings of a config.json can be raised.",
    ),
    (
        "a margin of more than all",
        ("plan", "{models}/tiny.py", *SMALL, "--margin", "1.5"),
        "--margin 1.5 is not a share of the memory (0 to 1).",
    ),
    (
        "a knob that is none",
        ("plan", "{models}/tiny.py", *SMALL, "--set", "colour=2"),
        "--set colour=2: expected tp, pp, dp, dp-replicate, micro-batch, vpp, zero with a "
        "number, head=none, checkpointed, in-forward, checkpoint=none, "
        "tempo, drop-activation, drop-norm, selective, sac-half, sdpa-only, full, "
        "schedule=gpipe, 1f1b, interleaved, "
        "zero-bubble, or a figure of a profile (cluster.host_memory_bytes=64GB).",
    ),
    (
        "a knob set twice",
        ("plan", "{models}/tiny.py", *SMALL, "--set", "tp=2", "--set", "tp=4"),
        "--set tp=4: tp is set twice.",
    ),
    (
        "a knob set to nothing",
        ("plan", "{models}/tiny.py", *SMALL, "--set", "tp=0"),
        "tp 0 is not a positive number.",
    ),
    (
        "a ZeRO level that is none",
        ("plan", "{models}/tiny.py", *SMALL, "--set", "zero=7"),
        "zero 7 is not a ZeRO level (0, 1, 2 or 3).",
    ),
    (
        "a limit that is none",
        ("plan", "{models}/tiny.py", *SMALL, "--max", "zero=2"),
        "--max zero=2: expected tp, pp, dp, dp-replicate, micro-batch, vpp with a number, or "
        "offload, weights, grads, optimizer, activations with a ratio from 0 to 1.",
    ),
    (
        "something unknown that is forbidden",
        ("plan", "{models}/tiny.py", *SMALL, "--forbid", "tp"),
        "--forbid tp: expected offload, weights, grads, optimizer, activations, "
        "tempo, drop-activation, drop-norm, selective, sac-half, sdpa-only, full, "
        "gpipe, 1f1b, interleaved, zero-bubble, unlike-stages, unequal-meshes.",
    ),
    (
        "an unknown space",
        ("plan", "{models}/tiny.py", *SMALL, "--space", "4d"),
        "--space 4d is not known. Known: 3d, megatron, deepspeed, fsdp, aceso, paper, "
        "paper+tempo, plain, mist, mist+heads, whole.",
    ),
    (
        "a share of nothing",
        ("check", "{models}/tiny.py", *SMALL, "--offload", "optimizer=2"),
        "--offload optimizer=2: expected weights, grads, optimizer, activations "
        "with a ratio from 0 to 1.",
    ),
    (
        "chunks without their schedule",
        ("check", "{models}/tiny.py", *SMALL, "--pp", "2", "--vpp", "2"),
        "--schedule 1f1b with --vpp 2: interleaved takes 2 or more chunks per stage, the others 1.",
    ),
    (
        "weights offloaded without gradients",
        ("check", "{models}/tiny.py", *SMALL, "--zero", "2", "--offload", "weights=0.5"),
        "runtime torch offloads weights and gradients of a layer together: "
        "their ratios are 0.5 and 0.",
    ),
    (
        "a schedule that the runtime lacks",
        (
            "check",
            "{models}/tiny.py",
            *SMALL,
            "--pp",
            "2",
            "--runtime",
            "nanotron",
            "--schedule",
            "zero-bubble",
        ),
        "schedule zero-bubble: runtime nanotron has gpipe, 1f1b.",
    ),
    (
        "a level that the runtime lacks",
        (
            "check",
            "{models}/tiny.py",
            *SMALL,
            "--checkpoint",
            "selective",
            "--runtime",
            "nanotron",
        ),
        "checkpoint selective: runtime nanotron has none, full.",
    ),
    (
        "an output folder that is missing",
        ("plan", "{models}/tiny.py", *SMALL, "--out", "missing/p.yaml"),
        "--out missing/p.yaml: the folder missing does not exist. Create it first.",
    ),
    (
        "an output folder that is a file",
        ("plan", "{models}/tiny.py", *SMALL, "--out", "{models}/tiny.py/p.yaml"),
        "--out {models}/tiny.py/p.yaml: {models}/tiny.py is not a folder. Choose another file.",
    ),
    (
        "an output that is no plan",
        ("plan", "{models}/tiny.py", *SMALL, "--out", "p.png"),
        "--out p.png: a plan file ends in .yaml.",
    ),
    (
        "check into a folder that is missing",
        ("check", "{models}/tiny.py", *SMALL, "--out", "missing/p.yaml"),
        "--out missing/p.yaml: the folder missing does not exist. Create it first.",
    ),
    (
        "a model to check without GPUs",
        ("check", "{models}/tiny.py"),
        "mist check {models}/tiny.py: a model needs --gpus.",
    ),
    (
        "a plan that is missing",
        ("check", "missing.yaml"),
        "missing.yaml cannot be read: No such file or directory.",
    ),
    (
        "options that a plan answers",
        ("check", "missing.yaml", "--tp", "2", "--gpus", "4"),
        "mist check missing.yaml: the plan file says itself what --tp, --gpus would. "
        "Leave them out, or give the model instead of the plan.",
    ),
    (
        "a point that is none",
        ("trace", "{models}/tiny.py", "--at", "b=2"),
        "--at b=2: expected b=2,s=128 and perhaps t=2, numbers from 1 to 1073741824.",
    ),
    (
        "a point of nothing",
        ("trace", "{models}/tiny.py", "--at", "b=0,s=128"),
        "--at b=0,s=128: expected b=2,s=128 and perhaps t=2, numbers from 1 to 1073741824.",
    ),
    (
        "a point beyond the positions",
        ("trace", "{models}/tiny.py", "--at", "b=1,s=1024,t=3"),
        "--at b=1,s=1024,t=3: tiny has positions for 512 tokens. "
        "tp 3 does not divide the 4 attention heads of tiny. "
        "tp 3 does not divide the 256 MLP width of tiny.",
    ),
    (
        "a policy that is none",
        ("trace", "{models}/tiny.py", "--policy", "tpu"),
        "--policy tpu is neither cuda nor cpu.",
    ),
    (
        "a profile that is none",
        ("profiles", "show", "h10"),
        "h10: no profile of that name. Did you mean ...",
    ),
    (
        "an action that is none",
        ("profiles", "draw"),
        "Say `mist profiles` or `mist profiles show NAME`.",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_a_refusal_has_its_words_and_leaves_nothing(
    mist: Mist, models: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    run = mist(*(argument.replace("{models}", str(models)) for argument in arguments))
    assert (run.code, run.out) == (2, "")
    expected = message.replace("{models}", str(models))
    # "..." stands for the names of the other presets or profiles.
    found = run.message
    if expected.endswith("..."):
        found = f"{found[: len(expected) - 3]}..."
    assert found == expected
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_cannot_be_written(
    mist: Mist, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    run = mist("plan", models / "tiny.py", *SMALL)
    assert (run.code, run.message) == (
        2,
        "cannot write into the current folder. Choose a file with --out.",
    )
    (tmp_path / "p.yaml").mkdir()
    run = mist("check", models / "tiny.py", *SMALL, "--out", "p.yaml")
    assert run.message == "--out p.yaml: cannot write there. Choose another file."


def test_a_broken_plan_file_tells_all_faults(mist: Mist, models: Path, tmp_path: Path) -> None:
    mist("plan", models / "tiny.py", *QUICK, "--out", "p.yaml")
    text = (tmp_path / "p.yaml").read_text()
    text = text.replace("mist.plan/1", "mist.plan/2").replace("weights: 0.0", "weights: 1.5")
    (tmp_path / "p.yaml").write_text(f"{text}colour: red\n")
    run = mist("check", "p.yaml", "--trust")
    assert (run.code, run.out) == (2, "")
    assert run.message == (
        "p.yaml has 3 faults:\n"
        "  schema: input should be 'mist.plan/1' (found \"mist.plan/2\")\n"
        "  stages[0].offload.weights: input should be less than or equal to 1 (found 1.5)\n"
        "  colour: unknown key"
    )


@pytest.mark.slow
def test_a_plan_for_another_model(mist: Mist, models: Path, tmp_path: Path) -> None:
    model = tmp_path / "mine.py"
    model.write_text((models / "tiny.py").read_text())
    mist("plan", "mine.py", *QUICK, "--out", "p.yaml")
    model.write_text(model.read_text().replace("1000", "2000"))
    run = mist("check", "p.yaml", "--trust")
    params = 4 * (4 * 64 * 64 + 2 * 64 * 256 + 256 + 64 + 128) + 2 * 1000 * 64
    assert run.code == 2
    assert run.message == (
        "p.yaml has 1 fault:\n"
        "  model.fingerprint: the plan is for another model: it was made for mine with "
        f"{params} parameters, mine.py is now mine with {params + 2 * 1000 * 64}"
    )


def test_a_model_that_does_not_fit(mist: Mist, models: Path, tmp_path: Path) -> None:
    run = mist("plan", models / "tiny.py", *SMALL, "--space", "3d", "--margin", 0.99999)
    assert (run.code, run.out) == (3, "")
    assert run.message.startswith("tiny does not fit on 4 x h100-sxm. Even in the layout of least")
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_a_plan_of_gemma2_has_ends_that_share_their_matrix(mist: Mist, tmp_path: Path) -> None:
    run = mist(
        "plan", "gemma2-9b", "--gpus", 8, "--gpu", "a100-sxm-40", "--seq", 4096,
        "--global-batch", 64, "--set", "pp=2", "--out", "gemma.yaml",
    )  # fmt: skip
    assert run.code == 0, run.err
    first, last = load_plan("gemma.yaml").stages
    assert (first.dp, first.tp, first.zero > 0) == (last.dp, last.tp, last.zero > 0)
    run = mist("check", "gemma.yaml")
    assert run.code == 0, run.err


@pytest.mark.slow
def test_llama_70b_on_two_l4_says_what_would_fit(mist: Mist, tmp_path: Path) -> None:
    run = mist("plan", "llama3-70b", "--gpus", 2, "--gpu", "l4")
    assert (run.code, run.out) == (3, "")
    assert run.message.startswith("llama3-70b does not fit on 2 x l4. ")
    # 70.55e9 parameters of 12 bytes are 0.85 TB. 8 GPUs and their host hold 0.48 TB, 16 twice that.
    assert " take 788.5 GiB (12 bytes of each)" in run.message
    assert " At least 16 such GPUs have room for them, before activations. " in run.message
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "option",
    [
        ("--precision", "bf8"),
        ("--top", "-1"),
        ("--solver", "simplex"),
        ("--time-limit", "-1"),
    ],
)
def test_typer_refuses_what_is_no_choice(mist: Mist, option: tuple[str, str]) -> None:
    run = mist("plan", "llama3-8b", "--gpus", "8", *option)
    assert (run.code, run.out) == (2, "")
    assert f"Invalid value for '{option[0]}'" in run.err


def test_ctrl_c_has_a_message_and_no_traceback(
    mist: Mist, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)  # the last step of writing a file
    run = mist("plan", models / "tiny.py", *QUICK)
    assert (run.code, run.out) == (130, "")
    assert run.message == "interrupted. No file is half written."
    assert "Traceback" not in run.err
    assert not [*tmp_path.iterdir()]


def start(*arguments: str, cwd: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )


@pytest.mark.slow
def test_a_real_ctrl_c(models: Path, tmp_path: Path) -> None:
    """The model's file says when it is being built, and waits."""
    text = "import sys, time\nprint('building', file=sys.stderr, flush=True)\ntime.sleep(60)\n"
    (tmp_path / "slow.py").write_text(text)
    # Where a shell runs the tests in the background Ctrl-C is ignored, and children inherit that.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(str(ROOT / "cli.py"), "plan", "slow.py", "--gpus", "4", cwd=tmp_path)
    signal.signal(signal.SIGINT, handler)
    assert process.stderr is not None
    for line in process.stderr:
        if line == "building\n":
            break
    time.sleep(0.2)  # into the sleep
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out) == (130, "")
    assert err == "mist: interrupted. No file is half written.\n"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["slow.py"]


def test_the_checkout_plans_and_a_check_needs_no_torch(
    mist: Mist, models: Path, tmp_path: Path
) -> None:
    process = start(str(ROOT / "cli.py"), "plan", str(models / "tiny.py"), *SMALL, cwd=tmp_path)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert out.startswith("FITS, with ")
    code = (
        "import sys\n"
        "sys.argv = ['mist', 'check', 'tiny-4xh100-sxm.yaml', '--trust']\n"
        "from mist.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print(sorted({'torch', 'transformers', 'pulp'} & {*sys.modules}))\n"
    )
    process = start("-c", code, cwd=tmp_path)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert out.startswith("FITS, with ")
    assert out.endswith("\n[]\n")


@pytest.mark.parametrize(
    ("name", "file_name"), [("llama3-8b", "llama3-8b"), ("../a b/7B", "a-b-7B"), ("//", "model")]
)
def test_a_model_name_becomes_a_file_name(name: str, file_name: str) -> None:
    assert planning._file_name(name) == file_name


def test_trace_writes_its_operations(mist: Mist, models: Path) -> None:
    """As text and as a picture, also from the cache; FLOPs of the text are those of the blocks."""
    for suffix in (".txt", ".svg"):
        path = Path(f"graph{suffix}")
        run = mist("trace", models / "tiny.py", "--graph", path, "--json")
        assert run.code == 0
        assert f"wrote {path}" in run.err
        assert path.stat().st_size > 1000
    text = Path("graph.txt").read_text()
    assert "= aten.mm.default(" in text
    blocks = {line for line in text.splitlines() if line.startswith("# ")}
    assert len(blocks) == len(json.loads(run.out)["blocks"])


def test_graph_of_another_kind_is_refused(mist: Mist, models: Path) -> None:
    run = mist("trace", models / "tiny.py", "--graph", "graph.pdf")
    assert run.code == 2
    assert run.message == "--graph graph.pdf: write an .svg or a .txt file."


def test_autocast_from_fp32_is_refused(mist: Mist, models: Path) -> None:
    run = mist("trace", models / "tiny.py", "--autocast", "--precision", "fp32")
    assert run.code == 2
    assert run.message == ("--autocast needs --precision bf16 or fp16: fp32 is what it casts from.")
