"""A plan or a judged layout, for people (tables) and for tools (one JSON object)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from mist.plans.breakdown import ROUNDING_RATIO
from mist.plans.file import plain_data
from mist.plans.host_memory import HostNeed
from mist.plans.plan import Estimate, Limits, Plan, Robustness
from mist.plans.provenance import Kind
from mist.report.intervals import peak_words
from mist.report.plan_words import data_parallel, offloaded, recomputed
from mist.report.tables import say, say_note, show
from mist.units import format_bytes, format_seconds


def print_details(plan: Plan, host: HostNeed, notes: Sequence[str]) -> None:
    """All parts of the prediction, why other layouts lose, sources, and what is left out."""
    _print_stages(plan)
    _print_memory(plan.estimate)
    _print_host(host)
    if plan.robustness:
        _print_robustness(plan.estimate.step_s, plan.robustness)
    _print_alternatives(plan)
    _print_op_costs(plan.estimate)
    for note in (*notes, *plan.estimate.extrapolated):
        say_note(note)
    _print_foot(plan)


def plan_json(
    plan: Plan, seconds: Mapping[str, float], host: HostNeed, notes: Sequence[str]
) -> dict[str, object]:
    """The plan file's own fields, plus `seconds` (wall time by part of the work) and `notes`.

    `fit_probability`: the chance that the peak fits the device. `host_memory`: what the fullest
    node needs of its memory, and what there is.
    """
    spent = {name: round(s, 3) for name, s in seconds.items()}
    more = {
        "fit_probability": round(plan.estimate.fit_probability, 4),
        "host_memory": _host_json(host),
        "seconds": spent,
        "notes": list(notes),
    }
    return {**plain_data(plan), **more}


def check_json(
    plan: Plan, limits: Limits, host: HostNeed, notes: Sequence[str]
) -> dict[str, object]:
    """Size of the model, verdict, prediction; of each stage its peak, usable bytes, parts of time.

    `fits`: on the device, and in host memory. `fit_probability`: the chance that the peak fits the
    device, without a margin. `margin_bytes` = `limit_bytes` (usable less the
    margin) - the largest peak; `host_memory`: of the fullest node; `parts`: bytes of the peak by
    name; `time_parts_s`: seconds of `stable_s` by name.
    """
    estimate = plan.estimate
    margin_bytes = limits.device_bytes - max(stage.peak_bytes for stage in estimate.stages)
    return {
        "params": plan.model.params,
        "overrides": plan.overrides,
        "trainable_params": plan.model.num_trainable,
        "fits": margin_bytes >= 0 and host.fits,
        "fit_probability": round(estimate.fit_probability, 4),
        "margin_bytes": round(margin_bytes),
        "limit_bytes": round(limits.device_bytes),
        "host_limit_bytes": round(limits.host_bytes),
        "host_memory": _host_json(host),
        "step_s": estimate.step_s,
        "tokens_per_s": estimate.tokens_per_s,
        "mfu": estimate.mfu,
        "uncertainty": asdict(estimate.uncertainty),
        "stages": [
            {
                "peak_bytes": stage.peak_bytes,
                "host_bytes": stage.host_bytes,
                "usable_bytes": stage.usable_bytes,
                "parts": stage.memory_parts_bytes,
                "stable_s": stage.stable_s,
                "delta_s": stage.delta_s,
                "time_parts_s": stage.time_parts_s,
            }
            for stage in estimate.stages
        ],
        "op_costs": [asdict(row) for row in estimate.op_costs],
        "extrapolated": list(estimate.extrapolated),
        "notes": list(notes),
        "not_modelled": list(estimate.not_modelled),
    }


def _host_json(host: HostNeed) -> dict[str, object]:
    return {**asdict(host), "needed_bytes": host.needed_bytes, "fits": host.fits}


def _print_stages(plan: Plan) -> None:
    """Times of each stage; its layout is on the screen, but for what has no room there."""
    rows = []
    for index, (stage, judged) in enumerate(zip(plan.stages, plan.estimate.stages, strict=True)):
        layers = ", ".join(f"{first}-{first + count - 1}" for first, count in stage.layers)
        device, rounding_s = stage.devices[0], ROUNDING_RATIO * judged.stable_s
        times = ", ".join(
            f"{name} {format_seconds(s)}"
            for name, s in judged.time_parts_s.items()
            if s > rounding_s
        )
        rows.append(
            (
                f"{index}: layers {layers}",
                f"{device}-{device + stage.devices[1] - 1}",
                data_parallel(stage),
                f"{stage.tp}{'+sp' if stage.sp else ''}",
                str(stage.zero),
                f"{stage.micro_batch} x{plan.num_micro_batches}",
                recomputed(stage),
                offloaded(stage),
                format_seconds(judged.stable_s),
                format_seconds(judged.delta_s),
                times,
            )
        )
    header = (
        "stage",
        "GPUs",
        "dp",
        "tp",
        "zero",
        "micro-batch",
        "recomputed",
        "on the host",
        "micro-batch time",
        "once per step",
        "parts of a micro-batch",
    )
    show("Stages (predicted times; once per step: first and last micro-batch)", header, rows)


def _print_memory(estimate: Estimate) -> None:
    rows = []
    for index, stage in enumerate(estimate.stages):
        parts = (format_bytes(size) for size in stage.memory_parts_bytes.values())
        host = format_bytes(stage.host_bytes)
        rows.append((str(index), *parts, format_bytes(stage.peak_bytes), host))
    header = ("stage", *estimate.stages[0].memory_parts_bytes, "peak", "in host memory")
    show(f"Memory per GPU ({peak_words(estimate)})", header, rows)


def _print_host(host: HostNeed) -> None:
    """What is offloaded and what there is for it; and what loading takes."""
    if host.held_bytes:
        advice = " Give yours with --host-memory." if host.kind is Kind.GUESS else ""
        say(f"This {host.words}. Source: {host.source}.{advice}")
    if host.loading_bytes is None:
        say("Host memory while the framework loads weights is not modelled.")
    else:
        drawn = format_bytes(host.loading_bytes)
        say(f"While weights are drawn, the ranks of a node have up to {drawn} of host memory.")


def _print_alternatives(plan: Plan) -> None:
    best = plan.estimate.step_s
    tables = (("Other layouts that fit", plan.alternatives), ("Faster, too large", plan.excluded))
    for title, others in tables:
        rows = [
            (
                other.layout,
                format_seconds(other.step_s),
                f"{other.step_s / best - 1:+.1%}",
                format_bytes(other.peak_bytes),
                f"{other.reason}; {other.needs}",
            )
            for other in others
        ]
        if rows:
            header = ("layout", "step", "slower", "peak", "why it loses; what it would need")
            show(title, header, rows)


def _print_robustness(step_s: float, robust: Robustness) -> None:
    """How the plan does where figures are wrong, and what would make another one better."""
    regret, nominal = robust.regret, robust.nominal_regret
    say(
        f"Over {robust.num_draws} draws of what is uncertain, a step takes "
        f"{format_seconds(robust.median_step_s)} (median) to {format_seconds(robust.worst_step_s)} "
        f"(worst); the best layout of each draw is {regret.mean_ratio:.1%} faster on the average, "
        f"{regret.worst_ratio:.1%} at most."
    )
    if robust.nominal_step_s < step_s * (1 - ROUNDING_RATIO):
        say(
            f"Chosen for that, within {robust.tolerance_ratio:.0%} of the fastest if every figure "
            f"is right: {robust.nominal_layout} takes {format_seconds(robust.nominal_step_s)}, "
            f"but loses {nominal.mean_ratio:.1%} on the average, {nominal.worst_ratio:.1%} at most."
        )
    for turn in robust.turns:
        say(f"{turn[0].upper()}{turn[1:]}.")


def _print_op_costs(estimate: Estimate) -> None:
    rows = [(row.what, row.how, row.kind, row.source) for row in estimate.op_costs]
    header = ("operation", "by", "kind", "source of the least sure figure")
    show("Op costs", header, rows)


def _print_foot(plan: Plan) -> None:
    provenance = plan.provenance
    say(
        f"Searched {provenance.search.get('stages_evaluated', 0)} stages in "
        f"{provenance.search.get('groups', 0)} groups; solver: {provenance.solver}; "
        f"optimality gap {provenance.gap:.2g} of the step."
    )
    say(f"Uncertainty: {plan.estimate.uncertainty.basis}.")
    say(f"Not modelled: {'; '.join(plan.estimate.not_modelled)}.")
