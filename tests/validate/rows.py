"""Measured runs made by hand."""

from dataclasses import replace

from mist.validate.measured_runs import Run
from mist.validate.results import RunPrediction

RUN = Run(
    run_id="one",
    source="hand",
    arch="dense-llama",
    task="pretrain",
    tier="A",
    outcome="ok",
    params_b=0.134,
    n_layers=6,
    hidden=256,
    n_heads=8,
    n_kv_heads=4,
    ffn_hidden=512,
    vocab=1024,
    seq_len=512,
    gpu="H100-80GB-SXM",
    n_gpus=8,
    dp=4,
    tp=2,
    pp=1,
    zero_or_fsdp="zero1",
    micro_batch=2,
    global_batch=32,
    grad_accum=4,
    activation_ckpt="none",
    precision="bf16",
    compile="no",
    attention_impl="flash",
    step_time_s=1.0,
)


def run(**columns: object) -> Run:
    """The run above with other columns."""
    return replace(RUN, **columns)  # type: ignore[arg-type]


def predicted(step_s: float, **columns: object) -> RunPrediction:
    """A run and its prediction."""
    return RunPrediction(
        run=run(**columns), status="predicted", platform="here", step_s=step_s, usable_gib=78.0
    )
