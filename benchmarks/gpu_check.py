"""The whole loop on one GPU, in minutes: is what Mist says of a card true of this one?

    python benchmarks/gpu_check.py [--out gpu-check] [--device cuda|cpu] [--tiny]

Every part stands by itself: one that fails is told, and the others go on. No part begins after
`LATEST_S`. Prints a table with PASS or FAIL, and writes all figures to OUT/gpu_check.json with the
plans and the measured profile beside it. `--tiny` is for a CPU: the same parts on a model of a few
thousand parameters, so that this file cannot rot between two cards.
"""

import argparse
import gc
import json
import os
import platform
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

LATEST_S: Final = 440.0  # no part begins later: 480 s are what one may have of a card
PEAK_RATIO, STEP_RATIO, HIDDEN_RATIO = 0.10, 0.25, 0.70  # bars: errors, and copies that are hidden
LOSS_RATIO = 0.02  # of losses of the same numbers: a bf16 loss of 10 has steps of 0.06
LLAMA_1B: Final = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
TINY: Final = {
    **LLAMA_1B,
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
WARM_STEPS, STEPS = 2, 5


@dataclass(slots=True, kw_only=True)
class Check:
    """What is checked, and what was found so far."""

    device: str
    tiny: bool
    out: Path
    begin: float = field(default_factory=time.monotonic)
    parts: dict[str, Any] = field(default_factory=dict)
    verdicts: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def model(self) -> Path:
        return self.out / ("tiny.json" if self.tiny else "llama-1b.json")

    @property
    def seq_len(self) -> int:
        return 64 if self.tiny else 4096

    @property
    def spent_s(self) -> float:
        return time.monotonic() - self.begin

    def say(self, part: str, passed: bool | None, words: str) -> None:
        """A verdict; None: nothing to judge."""
        verdict = {True: "PASS", False: "FAIL", None: "SKIP"}[passed]
        self.verdicts.append((part, verdict, words))
        print(f"{verdict}  {part}: {words}", flush=True)

    def write(self) -> None:
        text = json.dumps({"verdicts": self.verdicts, "seconds": self.spent_s, **self.parts})
        (self.out / "gpu_check.json").write_text(text + "\n", encoding="utf-8")


Part = Callable[[Check], object]


def run_part(check: Check, name: str, part: Part) -> None:
    """One part: what it gives is kept, what it raises is told."""
    if check.spent_s > LATEST_S:
        check.say(name, None, f"not begun after {check.spent_s:.0f} s")
        return
    begin = time.monotonic()
    try:
        found = part(check)
    except Exception as error:
        check.parts[name] = {"error": traceback.format_exc()}
        check.say(name, False, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
    else:
        check.parts[name] = {"seconds": time.monotonic() - begin, "found": found}
    check.write()


def versions(check: Check) -> dict[str, object]:
    import torch
    import transformers

    found: dict[str, object] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    if check.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        found |= {"device": about.name, "bytes": about.total_memory, "cuda": torch.version.cuda}
        command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit"]
        try:
            told = subprocess.run(
                [*command, "--format=csv,noheader"],
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
            found["driver"] = told.stdout.strip()
        except OSError:
            found["driver"] = "nvidia-smi is not here"
    check.say("versions", True, ", ".join(f"{k} {v}" for k, v in found.items()))
    return found


Layouts = dict[str, tuple[dict[str, Any], int]]
LAYOUTS: Final[Layouts] = {  # words of `mist check`; the micro-batch of each
    "nothing": ({}, 2),
    "selective": ({"checkpoint": "selective"}, 2),
    "full": ({"checkpoint": "full"}, 2),
    "activations offloaded": ({"offload": {"activations": 0.5}}, 2),
    "optimizer and weights offloaded": (
        {"zero": 2, "offload": {"optimizer": 1, "weights": 1, "grads": 1}},
        2,
    ),
    "zero3": ({"zero": 3}, 2),
}


def question(check: Check, profile: Path | None, precision: str) -> Any:  # noqa: ANN401 (mist is not loaded yet)
    """What is asked of the planner; without a profile by the card's name."""
    from mist.plans.workload import Precision
    from mist.workflow.request import Question

    return Question(
        model=str(check.model),
        num_gpus=1,
        cluster=None if profile is None else str(profile),
        gpu=None if profile is not None else shipped(check),
        seq_len=check.seq_len,
        global_batch=4,
        precision=Precision(precision),
    )


def shipped(check: Check) -> str:
    """The profile that ships for this card, or the H100's."""
    import torch

    name = torch.cuda.get_device_properties(0).name.lower() if check.device == "cuda" else ""
    known = ("h200", "h100-pcie", "h100-sxm", "b200", "a100-sxm-80", "a100-sxm-40", "l40s", "l4")
    words = {each: each.split("-")[:2] for each in known}
    return next((each for each in known if all(w in name for w in words[each])), "h100-sxm")


def level_layouts() -> Layouts:
    """Every memory level of the table that `LAYOUTS` has not, and every head but the plain one."""
    from mist.plans.memory_levels import KEEPS_ALL, LEVELS
    from mist.plans.workload import HeadMode

    levels = [level.value for level in LEVELS if level is not KEEPS_ALL]
    heads = [mode for mode in HeadMode if mode is not HeadMode.NONE]
    return {
        **{level: ({"checkpoint": level}, 2) for level in levels if level not in LAYOUTS},
        **{f"head {mode}": ({"head": mode}, 2) for mode in heads},
    }


def planned(check: Check, name: str, profile: Path | None) -> Any:  # noqa: ANN401
    """A layout as a plan with its prediction."""
    from mist.plans.file import save_plan
    from mist.plans.plan import Offload
    from mist.workflow.checking import HandLayout, check_layout

    words, micro_batch = (LAYOUTS | level_layouts())[name]
    options: dict[str, Any] = {**words, "micro_batch": micro_batch}
    if "offload" in options:
        options["offload"] = Offload(**options["offload"])
    precision = "fp32" if check.tiny else "bf16"
    plan = check_layout(question(check, profile, precision), HandLayout(**options)).plan
    save_plan(plan, check.out / f"{name.replace(' ', '-')}.yaml")
    return plan


@contextmanager
def one_rank(check: Check) -> Iterator[Any]:
    """Within: this process is the only rank of a run; gives its device."""
    from mist.exec.build.process_group import process_group

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ.update(dict(zip(names, "0011", strict=True)))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with process_group(120.0) as device:
        yield device


def trained(check: Check, plan: Any, device: Any, *, synchronous: bool = False) -> dict[str, Any]:  # noqa: ANN401
    """Train a few steps by `mist apply`'s own code: peaks of one of them, seconds of the others."""
    import torch

    from mist.exec.build import parallel as program
    from mist.exec.build.adamw import Settings
    from mist.exec.build.batches import Batches
    from mist.exec.build.empty_weights import load
    from mist.exec.build.host_copies import Swapper
    from mist.exec.build.model_structure import examine

    loaded = load(plan.model.source, plan.workload.attention)
    subject = program.subject_of(loaded, examine(loaded, check.seq_len), plan)
    begin = time.monotonic()
    with patch.object(program, "Swapper", partial(Swapper, overlap=not synchronous)):
        parallel = program.assemble(subject, plan, device, Settings())
    program.initialise(parallel, subject, 7)
    built_s = time.monotonic() - begin
    batches = Batches(loaded, plan.workload, 7)
    losses, seconds, parts = [], [], []
    for number in range(WARM_STEPS):
        losses.append(parallel.train_step(batches.step(number)).loss)
    _, measured = parallel.measured_step(batches.step(WARM_STEPS))
    for number in range(STEPS):
        batch = batches.step(WARM_STEPS + 1 + number)
        wait(check)
        begin = time.perf_counter()
        losses.append(parallel.train_step(batch).loss)
        wait(check)
        seconds.append(time.perf_counter() - begin)
        parts.append(parallel.clock.read())
    del parallel, subject, loaded
    gc.collect()
    if check.device == "cuda":
        torch.cuda.empty_cache()
    return {
        "built_s": built_s,
        "losses": losses,
        "seconds": seconds,
        "parts_s": {name: median(each[name] for each in parts) for name in parts[0]},
        "peak_bytes": measured.peak_bytes,
        "allocated_bytes": measured.allocated_bytes,
        "reserved_bytes": measured.reserved_bytes,
        "num_alloc_retries": measured.num_alloc_retries,
    }


def wait(check: Check) -> None:
    import torch

    if check.device == "cuda":
        torch.cuda.synchronize()


def parity(check: Check) -> dict[str, float]:
    """A tiny model under ZeRO-3 against plain torch, in fp32; and in bf16 whether it is finite."""
    import torch

    from mist.workflow.checking import HandLayout, check_layout

    small = Check(device=check.device, tiny=True, out=check.out)
    small.model.write_text(json.dumps(TINY))
    found: dict[str, float] = {}
    with one_rank(check) as device:
        for precision in ("fp32", "bf16"):
            asked = question(small, None, precision)
            plan = check_layout(asked, HandLayout(zero=3, micro_batch=4)).plan
            losses = trained(small, plan, device)["losses"]
            if precision == "bf16":
                found["bf16 finite"] = float(torch.tensor(losses).isfinite().all())
            else:
                known = plain_losses(plan, device, len(losses) + 1)
                del known[WARM_STEPS]  # the measured step's, which is not told
                found["fp32"] = max(abs(a - b) for a, b in zip(losses, known, strict=True))
    passed = found["fp32"] <= 2e-6 and found["bf16 finite"] == 1.0
    check.say(
        "parity", passed, f"fp32 losses differ by {found['fp32']:.1e} (bar 2e-6), bf16 finite"
    )
    return found


def plain_losses(plan: Any, device: Any, num_steps: int) -> list[float]:  # noqa: ANN401
    """Losses of one process with torch's own optimizer and clipping, from the same weights."""
    import torch
    from torch import nn

    from mist.exec.build.batches import Batches
    from mist.exec.build.empty_weights import load
    from mist.exec.build.loss import summed_loss
    from mist.exec.build.weight_init import initial_values

    loaded = load(plan.model.source, plan.workload.attention)
    model = loaded.module
    for name, module in model.named_modules():
        values = initial_values(model, name, 7, device)
        for own, value in list(module.named_parameters(recurse=False)):
            whole = values[own][tuple(slice(0, size) for size in value.shape)]
            setattr(module, own, nn.Parameter(whole.to(device)))
    for module in model.modules():
        for own, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, own, buffer.to(device))
    options: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(model.parameters(), eps=1e-8, **options)
    batches = Batches(loaded, plan.workload, 7)
    losses = []
    for number in range(num_steps):
        batch = to(batches.step(number), device)
        total, count = summed_loss(loaded, batch)
        loss = total / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def to(batch: Any, device: Any) -> Any:  # noqa: ANN401
    from torch.utils._pytree import tree_map

    return tree_map(lambda leaf: leaf.to(device), batch)


def measure(check: Check) -> dict[str, object]:
    """`mist profile` of this card, against its data sheet."""
    from mist.exec.profiling import Request
    from mist.files import write_text
    from mist.plans.workload import Precision
    from mist.platform.machine import dump_machine
    from mist.platform.profiles import load_device
    from mist.workflow.machine_profile import profile

    seconds = 4.0 if check.tiny else 60.0
    request = Request(device=check.device, num_ranks=1, seconds=seconds)
    machine = profile(request, "local", lambda message: None)
    write_text(check.out / "local.yaml", dump_machine(machine))
    device, sheet = machine.device, load_device(shipped(check)).profile
    hbm = device.hbm_bytes_per_s.value / sheet.hbm_bytes_per_s.value
    gemm = {
        name: each.gemm[Precision.BF16].peak_flop_per_s.value
        for name, each in (("measured", device), ("sheet", sheet))
    }
    rate = gemm["measured"] / gemm["sheet"]
    words = f"memory {hbm:.2f} and bf16 products {rate:.2f} of the data sheet's"
    inside = 0.6 <= hbm <= 1.0 and 0.5 <= rate <= 0.9
    check.say("profile", None if check.device == "cpu" else inside, words)
    return {"what": machine.what, "hbm_ratio": hbm, "bf16_ratio": rate}


def predictions(check: Check) -> dict[str, Any]:
    """Six layouts: predicted by the profile that ships and by the measured one, then trained."""
    return all_beside(check, "predictions", LAYOUTS)


def levels(check: Check) -> dict[str, Any]:
    """Layers at every other memory level, and heads: the same; and losses as the plain model's."""
    rows = all_beside(check, "levels", level_layouts())
    plain = check.parts["predictions"]["found"]["nothing"]["losses"]
    off = {
        name: max(abs(a / b - 1) for a, b in zip(row["losses"], plain, strict=True))
        for name, row in rows.items()
    }
    words = ", ".join(f"{name} {ratio:.1e}" for name, ratio in off.items())
    passed = max(off.values()) <= LOSS_RATIO if off else None
    check.say("losses of levels", passed, f"differ from the plain ones by {words}")
    return {"rows": rows, "losses_off": off}


def all_beside(check: Check, part: str, layouts: Layouts) -> dict[str, Any]:
    """Layouts beside their predictions, as long as there is time."""
    local = check.out / "local.yaml"
    profiles = (
        {"shipped": None, "measured": local} if check.device == "cuda" else {"measured": local}
    )
    rows: dict[str, Any] = {}
    print("| plan | profile | predicted peak | active | reserved | off | predicted | step | off |")
    with one_rank(check) as device:
        for name in layouts:
            if check.spent_s > LATEST_S:
                break
            try:
                rows[name] = beside(check, name, profiles, device)
            except Exception as error:  # the others go on
                check.say(f"plan {name}", False, f"{type(error).__name__}: {str(error)[:300]}")
    judge(check, part, rows, profiles)
    return rows


def beside(
    check: Check,
    name: str,
    profiles: dict[str, Path | None],
    device: Any,  # noqa: ANN401
) -> dict[str, Any]:
    """One layout, trained, with what each profile predicted of it."""
    from mist.calibrate.run_comparison import live_bytes

    plans = {word: planned(check, name, profile) for word, profile in profiles.items()}
    row = trained(check, plans["measured"], device)
    for word, plan in plans.items():
        stage = plan.estimate.stages[0]
        live, step_s = float(live_bytes(stage)), plan.estimate.step_s
        row[word] = {
            "live_bytes": live,
            "peak_bytes": stage.peak_bytes,
            "step_s": step_s,
            "peak_off": live / row["peak_bytes"] - 1,
            "step_off": step_s / median(row["seconds"]) - 1,
        }
        print(line(name, word, row), flush=True)
    return row


def line(name: str, word: str, row: dict[str, Any]) -> str:
    told, gib = row[word], 2**30
    reserved = row["reserved_bytes"]
    return (
        f"| {name} | {word} | {told['live_bytes'] / gib:.3f} GiB | {row['peak_bytes'] / gib:.3f} | "
        f"{'-' if reserved is None else f'{reserved / gib:.3f}'} | {told['peak_off']:+.1%} | "
        f"{told['step_s']:.4f} s | {median(row['seconds']):.4f} s | {told['step_off']:+.1%} |"
    )


def judge(check: Check, part: str, rows: dict[str, Any], profiles: dict[str, Any]) -> None:
    for word in profiles:
        peaks, steps = (
            [abs(row[word][key]) for row in rows.values()] for key in ("peak_off", "step_off")
        )
        if not peaks:
            check.say(f"{part}, {word}", None, "no layout was trained")
            continue
        words = f"peaks off by {max(peaks):.1%} at most, steps by {median(steps):.1%} (median)"
        right = max(peaks) <= PEAK_RATIO and median(steps) <= STEP_RATIO
        check.say(f"{part}, {word}", right if check.device == "cuda" else None, words)
    retries = sum(row["num_alloc_retries"] or 0 for row in rows.values())
    check.say(f"allocator, {part}", retries == 0, f"{retries} times memory had to be given back")


def rungs(check: Check) -> dict[str, Any]:
    """What a model of two converted layers keeps, and its time, by every step of the ladder."""
    import torch
    from transformers import AutoConfig, AutoModel

    from mist.layers import RUNGS, convert

    sizes = {**(TINY if check.tiny else LLAMA_1B), "num_hidden_layers": 2}
    config = AutoConfig.for_model(**sizes)
    ids = torch.zeros(2, check.seq_len, dtype=torch.int64, device=check.device)
    rows = {}
    for rung in ("none", *RUNGS):
        model = AutoModel.from_config(config, dtype=torch.bfloat16).to(check.device).train()
        if rung != "none":
            convert(model, rung)
        rows[rung] = {
            "kept_bytes": kept_bytes(model, ids),
            "seconds": timed(check, partial(forward_and_backward, model, ids)),
        }
        del model
    words = ", ".join(
        f"{n} {each['kept_bytes'] / rows['none']['kept_bytes']:.2f} of the bytes and "
        f"{each['seconds'] / rows['none']['seconds']:.2f} of the time"
        for n, each in rows.items()
    )
    check.say("steps of the ladder", True, words)
    return rows


def kept_bytes(model: Any, ids: Any) -> int:  # noqa: ANN401
    """What is kept for the backward pass, each storage once, without parameters."""
    import torch

    known = {each.untyped_storage()._cdata for each in (*model.parameters(), ids)}
    kept: dict[int, Any] = {}  # storages that live as long as this do not share an address

    def pack(tensor: Any) -> Any:  # noqa: ANN401
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def forward_and_backward(model: Any, ids: Any) -> None:  # noqa: ANN401
    model(ids, use_cache=False).last_hidden_state.sum().backward()


def overlap(check: Check) -> dict[str, float]:
    """Offloaded activations beside the computation, against the same code that copies at once."""
    found: dict[str, float] = {}
    with one_rank(check) as device:
        for name, layout, synchronous in (
            ("plain", "nothing", False),
            ("beside", "activations offloaded", False),
            ("at once", "activations offloaded", True),
        ):
            plan = planned(check, layout, check.out / "local.yaml")
            found[name] = median(trained(check, plan, device, synchronous=synchronous)["seconds"])
    copies_s = found["at once"] - found["plain"]
    exposed_s = max(found["beside"] - found["plain"], 0.0)
    hidden = 1 - exposed_s / copies_s if copies_s > 0 else 0.0
    words = (
        f"copies {1e3 * copies_s:.1f} ms, exposed {1e3 * exposed_s:.1f} ms ({hidden:.0%} hidden)"
    )
    check.say("overlap", hidden >= HIDDEN_RATIO if check.device == "cuda" else None, words)
    return {**found, "hidden": hidden}


def sustained(check: Check) -> dict[str, object]:
    """bf16 products for seconds on end, and attention by every kernel that there is."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device, size = torch.device(check.device), 256 if check.tiny else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    limit, count, begin = (0.2 if check.tiny else 4.0), 0, time.perf_counter()
    while time.perf_counter() - begin < limit:
        a @ b
        count += 1
        if count % 8 == 0:
            wait(check)
    wait(check)
    rate = 2 * size**3 * count / (time.perf_counter() - begin)
    shape = (2, 16, check.seq_len, 128)
    q, k, v = (
        torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    seconds: dict[str, float | str] = {}
    for backend in (*SDPBackend.__members__.values(), None):
        name = "default" if backend is None else backend.name
        if name in ("ERROR", "OVERRIDEABLE"):
            continue
        try:
            with sdpa_kernel(backend if backend is not None else list(KERNELS(SDPBackend))):
                seconds[name] = timed(
                    check,
                    lambda: torch.autograd.grad(
                        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum(), (q, k, v)
                    ),
                )
        except RuntimeError as error:
            seconds[name] = str(error).splitlines()[0]
    choice = SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=True)).name
    told = [f"{n} {1e3 * s:.2f} ms" for n, s in seconds.items() if isinstance(s, float)]
    check.say(
        "sustained", True, f"{rate / 1e12:.1f} TFLOP/s; {choice} by default; {', '.join(told)}"
    )
    return {"bf16_flop_per_s": rate, "attention_s": seconds, "default": choice}


def KERNELS(backends: Any) -> Iterator[Any]:  # noqa: ANN401, N802
    """Those that the default may pick among."""
    return (each for name, each in backends.__members__.items() if name not in ("ERROR",))


def timed(check: Check, call: Callable[[], object]) -> float:
    samples = []
    for _ in range(6):
        wait(check)
        begin = time.perf_counter()
        call()
        wait(check)
        samples.append(time.perf_counter() - begin)
    return median(samples[1:])


PARTS: Final[dict[str, Part]] = {
    "versions": versions,
    "parity": parity,
    "profile": measure,
    "predictions": predictions,
    "overlap": overlap,
    "levels": levels,
    "steps of the ladder": rungs,
    "sustained": sustained,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-check"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    if asked.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    asked.out.mkdir(parents=True, exist_ok=True)
    check = Check(device=asked.device, tiny=asked.tiny, out=asked.out)
    check.model.write_text(json.dumps(TINY if asked.tiny else LLAMA_1B))
    for name, part in PARTS.items():
        run_part(check, name, part)
    print("\n| part | verdict | figures |\n|---|---|---|")
    for verdict in check.verdicts:
        print("| " + " | ".join(verdict) + " |")
    return int(any(verdict == "FAIL" for _, verdict, _ in check.verdicts))


if __name__ == "__main__":
    sys.exit(main())
