"""What `mist export` says: losses, whether the exported layout fits, files."""

from collections.abc import Mapping, Sequence

from mist.export.target import ExportLoss
from mist.plans.plan import Plan
from mist.units import format_bytes, format_seconds


def print_export(
    target: str, paths: Sequence[str], losses: Sequence[ExportLoss], verdict: str
) -> None:
    """The losses a line each, the verdict, the files."""
    for loss in losses:
        print(loss)
    print(verdict)
    print(f"{target}: {', '.join(paths)}")


def verdict_words(plan: Plan, *, fits: bool, margin_bytes: float) -> str:
    """Whether the exported layout fits under its runtime, by how many bytes, and its step time."""
    room = format_bytes(abs(margin_bytes))
    device = f"{room} {'to spare' if margin_bytes >= 0 else 'too much'} on a device"
    words = "fits" if fits else "does not fit"
    step = format_seconds(plan.estimate.step_s)
    return f"Under runtime {plan.runtime} it {words} ({device}): {step} per step."


def export_json(
    target: str,
    paths: Sequence[str],
    losses: Sequence[ExportLoss],
    judged: Mapping[str, object],
) -> dict[str, object]:
    """One object: target, files, losses by kind and field, and the judgement."""
    words = ("kind", "field", "message")
    rows = [{word: str(getattr(loss, word)) for word in words} for loss in losses]
    return {"target": target, "files": list(paths), "losses": rows, **judged}
