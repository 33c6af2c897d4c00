"""A verified plan: what its program holds and issues beside the prediction."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from mist.exec.observation import Seen, StageVerified
from mist.report.png_file import png_of
from mist.report.tables import say, show
from mist.units import GIB, format_bytes

if TYPE_CHECKING:
    pass

LAYER = "layer "  # begins the names of parts that single layers keep


def print_verified(stages: Sequence[StageVerified], unseen: str) -> None:
    """Verdict, peaks with their composition, and collectives; all of them of one rank per stage."""
    over = [i for i, stage in enumerate(stages) if not stage.fits]
    off = [i for i, stage in enumerate(stages) if not stage.agrees]
    say(f"DOES NOT FIT: stages {over}" if over else "FITS: every stage's program, dry-run")
    say(
        f"PREDICTION AND PROGRAM DIFFER in stages {off}"
        if off
        else "Prediction and program agree in every stage."
    )
    _print_peaks(stages)
    _print_parts(stages)
    _print_collectives(stages)
    allowance = stages[0].allowance_bytes / stages[0].seen.peak_bytes
    say(f"Allowance of {allowance:.0%} (runtime profile) for what a dry run cannot see: {unseen}.")


def _print_peaks(stages: Sequence[StageVerified]) -> None:
    rows = [
        (
            str(index),
            str(stage.seen.rank),
            format_bytes(stage.seen.peak_bytes),
            format_bytes(stage.predicted_bytes),
            f"{stage.difference_ratio:+.1%}",
            format_bytes(stage.allowance_bytes),
            format_bytes(stage.usable_bytes),
            f"{format_bytes(stage.seen.host_bytes)} / {format_bytes(stage.predicted_host_bytes)}",
            f"{stage.seen.phase} {stage.seen.module} {stage.seen.operation}".replace("  ", " "),
        )
        for index, stage in enumerate(stages)
    ]
    header = ("stage", "rank", "seen", "predicted", "differs", "allowance", "usable")
    show("Peak of live bytes", (*header, "host seen / predicted", "where"), rows)


def parts_of(seen: Seen) -> dict[str, int]:
    """Bytes at the peak by part, layers together."""
    total: Counter[str] = Counter()
    for name, size in seen.parts_bytes.items():
        total["activations of layers" if name.startswith(LAYER) else name] += size
    return dict(total.most_common())


def _print_parts(stages: Sequence[StageVerified]) -> None:
    found = [parts_of(stage.seen) for stage in stages]
    names = list(dict.fromkeys(name for parts in found for name in parts))
    rows = [
        (str(i), *(format_bytes(parts.get(name, 0)) for name in names))
        for i, parts in enumerate(found)
    ]
    show("What the peak is made of", ("stage", *names), rows)


def _print_collectives(stages: Sequence[StageVerified]) -> None:
    rows = [
        (
            str(index),
            f"{row.axis} {row.kind}",
            str(row.issued),
            str(row.charged),
            format_bytes(row.issued_bytes),
            format_bytes(row.charged_bytes),
            "" if row.agrees else "DIFFERS",
        )
        for index, stage in enumerate(stages)
        for row in stage.collectives
    ]
    header = ("stage", "collective", "issued", "charged", "bytes issued", "bytes charged", "")
    show("Collectives of a step, of one rank", header, rows)


def verified_json(
    stages: Sequence[StageVerified], *, fits: bool, agrees: bool
) -> dict[str, object]:
    """All of it; `stages`: see `mist verify` in docs/verify.md."""
    return {
        "fits": fits,
        "agrees": agrees,
        "stages": [
            {
                **asdict(stage),
                "difference_ratio": stage.difference_ratio,
                "fits": stage.fits,
                "agrees": stage.agrees,
            }
            for stage in stages
        ],
    }


def timeline_png(stages: Sequence[StageVerified]) -> bytes:
    """Live bytes over the step, a line for each stage, as a PNG file's content."""
    from matplotlib.figure import Figure

    figure: Figure = Figure(figsize=(9.0, 5.0), layout="constrained")
    axes = figure.add_subplot()
    for index, stage in enumerate(stages):
        held = [moment.peak_bytes / GIB for moment in stage.seen.timeline]
        axes.step(range(len(held)), held, where="post", label=f"stage {index}", linewidth=0.8)
    axes.axhline(stages[0].usable_bytes / GIB, color="tab:red", label="usable")
    axes.set(xlabel="events of a step: layers forward and backward", ylabel="live bytes [GiB]")
    axes.legend()
    return png_of(figure)
