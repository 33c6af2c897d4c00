"""Megatron-LM: a file of arguments and a script that starts pretrain_gpt.py with them; the inverse.

Options and their checks: megatron/training/arguments.py of megatron-core 0.19.2. A layout names the
parts of the pipeline in the order of the model, part p is chunk p // S of stage p % S:
"Et*9|t*8|t*7L" has the embedding (E), 9, 8 and 7 layers (t) and the loss (L).
"""

import re
from collections.abc import Iterator, Sequence
from typing import Final

from mist.errors import InputError
from mist.export.command_words import Options, launched, number, options_of
from mist.export.launcher_lines import head, launch_script
from mist.export.megatron_model import SIZES, ArgumentLine, model_lines, unsaid_of_model
from mist.export.target import (
    Configuration,
    ExportLoss,
    ExportSource,
    Expresses,
    Written,
    added,
    refused,
)
from mist.export.unread_settings import NEVER, SettingKinds, unread
from mist.plans.memory_levels import KEEPS_ALL, OWN_PART, REPEATS_ALL
from mist.plans.plan import Offload, Plan
from mist.plans.schedules import kind_of
from mist.plans.workload import Precision

ARGUMENTS: Final = "megatron_arguments.sh"


def _faults(plan: Plan) -> list[ExportLoss]:
    """What Megatron takes without a word, or refuses only when it runs."""
    stage, losses = plan.stages[0], []
    if stage.offload.optimizer and stage.zero != 1:
        words = f"{stage.offload.optimizer:g} at ZeRO-{stage.zero}; megatron needs ZeRO-1 for it"
        losses.append(refused("stages[].offload.optimizer", words))
    if len(plan.stages) > 1 and plan.schedule.vpp > 1 and plan.num_micro_batches % len(plan.stages):
        words = f"{plan.num_micro_batches} is no multiple of the {len(plan.stages)} stages"
        losses.append(refused("num_micro_batches", f"{words}, which interleaving needs"))
    return losses


MEGATRON: Final = Expresses(
    zero={0: 0, 1: 1, 2: 2, 3: 3},
    schedules={kind_of(1): "1F1B", kind_of(2): "interleaved 1F1B"},
    partly=(OWN_PART,),
    repeats="first",
    sequence=True,
    hosted=frozenset({"optimizer"}),
    shares_from=1,
    faults=_faults,
)


def write_megatron(subject: ExportSource) -> Written:
    """The arguments as a bash array, and the script that starts training with them."""
    plan = subject.plan
    lines = [
        *head(subject, "Arguments of Megatron-LM (pretrain_gpt.py), for bash to source."),
        "MEGATRON_ARGUMENTS=(",
        *(line.text for line in layout_lines(plan)),
        *(line.text for line in model_lines(subject.config)),
        ")",
    ]
    env, losses = _environment(plan)
    if not subject.config:
        words = (
            "a plan of a Python file says no sizes; add --hidden-size, --num-attention-heads, ..."
        )
        losses.append(added("model", words))
    losses += [added("model", words) for words in unsaid_of_model(subject.config)]
    words = "--data-path, --tokenizer-type, --lr, --train-iters and the like are yours"
    losses.append(added("workload", f"{words}: give them to launch.sh"))
    command = ["pretrain_gpt.py", '"${MEGATRON_ARGUMENTS[@]}"', '"$@"']
    env = [f'source "$(dirname "$0")/{ARGUMENTS}"', *env]
    script = launch_script(subject, "Starts Megatron-LM.", command, env=env)
    return Written(files={ARGUMENTS: "\n".join(lines) + "\n", "launch.sh": script}, added=losses)


def _environment(plan: Plan) -> tuple[list[str], list[ExportLoss]]:
    """The variable that orders kernels: Megatron refuses the wrong one of its two values."""
    name, stage = "CUDA_DEVICE_MAX_CONNECTIONS", plan.stages[0]
    if stage.zero > 1:
        words = f"{name} must be unset with --use-megatron-fsdp: launch.sh unsets it"
        return [f"unset {name}  # stages[].zero"], [added("stages[].zero", words)]
    if stage.tp > 1:
        words = f"{name}=1 is needed before Blackwell: launch.sh sets it"
        return [f"export {name}=1  # stages[].tp"], [added("stages[].tp", words)]
    return [], []


def layout_lines(plan: Plan) -> Iterator[ArgumentLine]:
    """The options of everything but the model."""
    stage, work = plan.stages[0], plan.workload
    yield ArgumentLine(
        option="--tensor-model-parallel-size", value=str(stage.tp), field="stages[].tp"
    )
    if stage.sp:
        yield ArgumentLine(option="--sequence-parallel", field="stages[].sp")
    yield from _pipeline_lines(plan)
    yield ArgumentLine(
        option="--micro-batch-size", value=str(stage.micro_batch), field="stages[].micro_batch"
    )
    yield ArgumentLine(
        option="--global-batch-size",
        value=str(work.global_batch),
        field=f"workload.global_batch = dp {stage.dp} * micro_batch {stage.micro_batch} * "
        f"num_micro_batches {plan.num_micro_batches}",
    )
    yield ArgumentLine(option="--seq-length", value=str(work.seq_len), field="workload.seq_len")
    if work.precision is not Precision.FP32:
        yield ArgumentLine(option=f"--{work.precision}", field="workload.precision")
    yield ArgumentLine(option="--optimizer", value="adam", field="workload.optimizer")
    if work.attention == "flash":
        yield ArgumentLine(option="--use-flash-attn", field="workload.attention")
    yield from _state_lines(plan)
    yield from _recompute_lines(plan)


def _pipeline_lines(plan: Plan) -> Iterator[ArgumentLine]:
    pp, vpp = len(plan.stages), plan.schedule.vpp
    yield ArgumentLine(option="--pipeline-model-parallel-size", value=str(pp), field="stages")
    counts = chunk_layers(plan)
    if pp > 1 and len(set(counts)) > 1:
        yield ArgumentLine(
            option="--pipeline-model-parallel-layout",
            value=layout_words(counts),
            field="stages[].layers",
        )
    elif vpp > 1:
        yield ArgumentLine(
            option="--num-virtual-stages-per-pipeline-rank", value=str(vpp), field="schedule.vpp"
        )


def _state_lines(plan: Plan) -> Iterator[ArgumentLine]:
    stage = plan.stages[0]
    field = "stages[].zero"
    if stage.zero:
        yield ArgumentLine(option="--use-distributed-optimizer", field=field)
    if stage.zero == 1:
        yield ArgumentLine(option="--overlap-grad-reduce", field=field)
        yield ArgumentLine(option="--overlap-param-gather", field=field)
    if stage.zero > 1:
        strategy = {2: "optim_grads", 3: "optim_grads_params"}[stage.zero]
        yield ArgumentLine(option="--use-megatron-fsdp", field=field)
        yield ArgumentLine(option="--data-parallel-sharding-strategy", value=strategy, field=field)
        yield ArgumentLine(option="--ckpt-format", value="fsdp_dtensor", field=field)
    if ratio := stage.offload.optimizer:
        field = "stages[].offload.optimizer"
        yield ArgumentLine(option="--optimizer-cpu-offload", field=field)
        yield ArgumentLine(
            option="--optimizer-offload-fraction", value=repr(float(ratio)), field=field
        )
        yield ArgumentLine(option="--use-precision-aware-optimizer", field=field)


def _recompute_lines(plan: Plan) -> Iterator[ArgumentLine]:
    field = "stages[].memory"
    if any(OWN_PART in stage.levels for stage in plan.stages):
        yield ArgumentLine(option="--recompute-granularity", value=OWN_PART, field=field)
        yield ArgumentLine(option="--recompute-modules", value="core_attn", field=field)
        return
    count = max(_full_of_chunks(plan))
    if count:
        yield ArgumentLine(option="--recompute-granularity", value=REPEATS_ALL.value, field=field)
        yield ArgumentLine(option="--recompute-method", value="block", field=field)
        yield ArgumentLine(option="--recompute-num-layers", value=str(count), field=field)


def _full_of_chunks(plan: Plan) -> Iterator[int]:
    """Layers of each chunk that are run again whole, in a plan that Megatron can express."""
    for stage in plan.stages:
        # The same number c in each chunk, or all of a shorter one: c is the most, and follows from
        # the sum over the chunks of one stage.
        sizes, count = [size for _, size in stage.layers], stage.num_full
        yield next(c for c in range(max(sizes) + 1) if sum(min(c, size) for size in sizes) >= count)


def chunk_layers(plan: Plan) -> tuple[int, ...]:
    """Layers of each chunk of each stage, in the order of the model."""
    runs = [run for stage in plan.stages for run in stage.layers]
    return tuple(count for _, count in sorted(runs))


def layout_words(counts: Sequence[int]) -> str:
    """The layout of parts of so many layers."""
    return "E" + "|".join(f"t*{count}" for count in counts) + "L"


def recognises_megatron(text: str) -> bool:
    """Whether a text has an option that no other framework has."""
    return "--tensor-model-parallel-size" in text or "--pipeline-model-parallel-size" in text


# What the layout is read from; every other option that is not of the model is listed.
READ: Final = frozenset(
    {
        "--tensor-model-parallel-size", "--sequence-parallel", "--pipeline-model-parallel-size",
        "--pipeline-model-parallel-layout", "--num-virtual-stages-per-pipeline-rank",
        "--micro-batch-size", "--global-batch-size", "--seq-length", "--bf16", "--fp16",
        "--use-flash-attn", "--use-distributed-optimizer", "--overlap-grad-reduce",
        "--overlap-param-gather", "--use-megatron-fsdp", "--data-parallel-sharding-strategy",
        "--ckpt-format", "--optimizer-cpu-offload", "--optimizer-offload-fraction",
        "--use-precision-aware-optimizer", "--recompute-granularity", "--recompute-method",
        "--recompute-num-layers", "--recompute-modules", "--group-query-attention", "--swiglu",
        "--untie-embeddings-and-output-weights", "--disable-bias-linear", "--normalization",
        "--position-embedding-type", "--rotary-base", "--recompute-activations",
        "--use-rope-scaling", "--rope-scaling-factor",
        "--num-layers-per-virtual-pipeline-stage", "--decoder-first-pipeline-num-layers",
        "--decoder-last-pipeline-num-layers", *SIZES,
    }
)  # fmt: skip
DECISIVE: Final = {
    "--expert-model-parallel-size": ("1",),
    "--expert-tensor-parallel-size": ("1",),
    "--context-parallel-size": ("1",),
    "--encoder-tensor-model-parallel-size": ("0", "1"),
    "--encoder-pipeline-model-parallel-size": ("0", "1"),
    "--mtp-num-layers": ("0",),
    "--cpu-offloading-num-layers": ("0",),
    "--zero-stage": ("0",),
    "--deepspeed": NEVER,
    "--use-torch-fsdp2": NEVER,
    "--fine-grained-activation-offloading": NEVER,
    "--distribute-saved-activations": NEVER,
    "--account-for-embedding-in-pipeline-split": NEVER,
    "--account-for-loss-in-pipeline-split": NEVER,
    "--attention-backend": ("auto", "flash", "fused"),
    "--optimizer": ("adam",),
}
"""Options that decide what a GPU holds, with the values that are predicted."""
KINDS: Final = SettingKinds(
    read=READ,
    sign=" ",
    untouched=(
        "--lr", "--min-lr", "--decoupled-", "--adam-", "--weight-decay", "--start-weight-decay",
        "--end-weight-decay", "--clip-grad", "--init-method", "--train-iters", "--train-samples",
        "--override-opt", "--data-path", "--data-cache", "--mock-data", "--split", "--vocab-file",
        "--merge-file", "--tokenizer", "--num-workers", "--dataloader", "--train-data", "--valid",
        "--test-data", "--reset-", "--eod-", "--no-create-attention", "--log", "--timing-",
        "--tensorboard", "--wandb", "--save", "--load", "--no-save", "--no-load", "--finetune",
        "--ckpt", "--async-save", "--dist-ckpt", "--use-dist-ckpt", "--auto-detect-ckpt", "--eval",
        "--exit-", "--seed", "--distributed-", "--norm-epsilon", "--layernorm-epsilon",
        "--rotary-percent", "--moe-aux-loss", "--moe-z-loss", "--moe-router-load", "--job-",
        "--manual-gc", "--use-mcore-models", "--no-gradient-accumulation-fusion",
    ),
    decisive=DECISIVE,
)  # fmt: skip
NAMES: Final = {
    "--tensor-model-parallel-size": "tp",
    "--pipeline-model-parallel-size": "pp",
    "--num-virtual-stages-per-pipeline-rank": "vpp",
    "--num-layers-per-virtual-pipeline-stage": "vpp",
    "--pipeline-model-parallel-layout": "layers",
    "--decoder-first-pipeline-num-layers": "layers",
    "--decoder-last-pipeline-num-layers": "layers",
    "--data-parallel-sharding-strategy": "zero",
    "--use-distributed-optimizer": "zero",
    "--micro-batch-size": "micro_batch",
    "--global-batch-size": "global_batch",
    "--seq-length": "seq",
    "--recompute-granularity": "checkpoint",
    "--recompute-num-layers": "checkpoint",
    "--optimizer-offload-fraction": "offload",
    "--fp16": "precision",
    "--bf16": "precision",
    "--num-layers": "num_layers",
}
"""Which option of `mist check` an option of Megatron answers."""
LAUNCH: Final = re.compile(
    r"--(nnodes|nproc[-_]per[-_]node|rdzv[-_]\w+|node[-_]rank|master[-_]\w+)"
)


def read_megatron(text: str, path: str) -> Configuration:
    """The layout of a file or script of Megatron's arguments. Raises InputError naming an option.

    Options that refuse or change nothing here are listed as not modelled, with their values.
    """
    options = options_of(text, path)
    said = {n: " ".join(values) for n, values in options.items() if not LAUNCH.fullmatch(n)}
    others = unread(said, KINDS, text, path)
    pp = number(options, "--pipeline-model-parallel-size", path, 1) or 1
    layers = layout_layers(options, path) or _end_layers(options, path, pp)
    if layers and len(layers) % pp:
        raise InputError(
            f"{path}: --pipeline-model-parallel-layout has {len(layers)} parts, no multiple of "
            f"--pipeline-model-parallel-size {pp}."
        )
    vpp = len(layers) // pp if layers else _vpp(options, path, pp)
    return Configuration(
        knobs={
            **{
                name: number(options, option, path, 1) or 1
                for option, name in NAMES.items()
                if name in ("tp", "micro_batch")
            },
            "pp": pp,
            "vpp": vpp,
            "zero": _zero(options, path),
        },
        checkpoint=_checkpoint(options, path, layers, (pp, vpp)),
        schedule=kind_of(vpp),
        offload=Offload(optimizer=_fraction(options, path)),
        layers=layers,
        seq_len=number(options, "--seq-length", path),
        global_batch=number(options, "--global-batch-size", path),
        precision=_precision(options),
        num_layers=number(options, "--num-layers", path),
        launched=launched(options),
        shards_sequence="--sequence-parallel" in options,
        unmodelled=(*_ignored(options), *others.unmodelled),
        untouched=others.untouched,
    )


def _vpp(options: Options, path: str, pp: int) -> int:
    """Chunks of a stage: their number, or that of the layers of each."""
    option = "--num-layers-per-virtual-pipeline-stage"
    size = number(options, option, path)
    if size is None:
        return number(options, "--num-virtual-stages-per-pipeline-rank", path, 1) or 1
    num_layers = number(options, "--num-layers", path)
    if num_layers is None or size < 1 or num_layers % (pp * size):
        raise InputError(
            f"{path}: {option} {size}: {num_layers or 'an unknown number of'} layers do not divide "
            f"into chunks of {size} on {pp} stages."
        )
    return num_layers // (pp * size)


def _end_layers(options: Options, path: str, pp: int) -> tuple[int, ...]:
    """Layers of each stage where the first or the last has a number of its own, else none."""
    names = ("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers")
    ends = [number(options, name, path) for name in names]
    if ends == [None, None]:
        return ()
    num_layers, given = number(options, "--num-layers", path), [n for n in ends if n is not None]
    between = pp - len(given)
    left = -1 if num_layers is None else num_layers - sum(given)
    if min(given) < 1 or between < 1 or left < between or left % between:
        raise InputError(
            f"{path}: {' and '.join(name for name in names if name in options)} leave "
            f"{left} layers for {between} stages, which is no equal split."
        )
    first, last = ([] if n is None else [n] for n in ends)
    return (*first, *[left // between] * between, *last)


def layout_layers(options: Options, path: str) -> tuple[int, ...]:
    """Layers of each part of the stated layout; none where it is not stated."""
    option = "--pipeline-model-parallel-layout"
    words = " ".join(options.get(option, ()))
    if option not in options:
        return ()
    counts = []
    for part in words.replace(",", "").split("|"):
        found = re.fullmatch(r"E?((?:t(?:\*\d{1,5})?)*)L?", part)
        if found is None:
            known = "E, t, t*9, L and | of it are read"
            raise InputError(f"{path}: {option} {words}: part {part!r}: only {known}.")
        counts.append(sum(int(n or 1) for n in re.findall(r"t(?:\*(\d+))?", found[1])))
    return tuple(counts)


def _zero(options: Options, path: str) -> int:
    strategy = " ".join(options.get("--data-parallel-sharding-strategy", ("no_shard",)))
    if "--use-megatron-fsdp" in options:
        levels = {"no_shard": 0, "optim": 1, "optim_grads": 2, "optim_grads_params": 3}
        if strategy not in levels:
            known = ", ".join(levels)
            raise InputError(
                f"{path}: --data-parallel-sharding-strategy {strategy}: it is none of {known}."
            )
        return levels[strategy]
    return int("--use-distributed-optimizer" in options)


def _fraction(options: Options, path: str) -> float:
    if "--optimizer-cpu-offload" not in options:
        return 0.0
    words = " ".join(options.get("--optimizer-offload-fraction", ("1.0",)))
    try:
        ratio = float(words)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 1:  # Megatron takes 1.7
        raise InputError(f"{path}: --optimizer-offload-fraction {words} is no ratio from 0 to 1.")
    return ratio


def _precision(options: Options) -> Precision:
    given = [each for each in Precision if f"--{each}" in options]
    return given[0] if given else Precision.FP32


def _checkpoint(
    options: Options, path: str, layers: Sequence[int], pipeline: tuple[int, int]
) -> str:
    """The memory level or the number of layers of each stage that are run again."""
    granularity = " ".join(options.get("--recompute-granularity", ()))
    if "--recompute-activations" in options:
        return OWN_PART.value
    if not granularity:
        return KEEPS_ALL.value
    if granularity == OWN_PART:
        return granularity
    pp, vpp = pipeline
    method = " ".join(options.get("--recompute-method", ("uniform",)))
    if method == "uniform":  # the number is then the size of a group: all layers are run again
        return REPEATS_ALL.value
    count = number(options, "--recompute-num-layers", path, 1) or 0
    if vpp == 1 or not layers:
        return str(count * vpp)
    chunks = [min(count, size) for size in layers]
    return ",".join(str(sum(chunks[stage::pp])) for stage in range(pp))


def _ignored(options: Options) -> Iterator[str]:
    """What is read, but has no part in what is predicted."""
    strays = options.get("--recompute-modules", ("core_attn",))
    if tuple(strays) != ("core_attn",):
        yield f"--recompute-modules {' '.join(strays)}"
    strategy, fsdp = "--data-parallel-sharding-strategy", "--use-megatron-fsdp"
    if strategy in options and fsdp not in options:
        yield f"{strategy} {' '.join(options[strategy])} (Megatron ignores it without {fsdp})"
