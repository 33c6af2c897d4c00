"""What operations cost: the trace of a model, and the profiles with every figure's source."""

from collections.abc import Iterator, Mapping, Sequence
from math import exp
from typing import Final

import sympy

from mist.model.graph import B, Block, ModelGraph, S, T
from mist.model.summary import trained_words
from mist.plans.workload import Precision
from mist.platform.listing import FigureRow, ProfileRow
from mist.platform.machine import Machine
from mist.report.tables import say, say_note, show
from mist.rules.combinations import limit_rules
from mist.rules.rule import broken
from mist.units import GB, MICROSECOND, format_bytes, format_seconds

Point = Mapping[str, int]

# Tensor parallelism without and with sequence parallelism.
MODES: Final = {"tp": False, "tp_sp": True}
Costs = dict[str, sympy.Expr]


def outside_trace(graph: ModelGraph, point: Point) -> Iterator[str]:
    """Why the costs of a graph say nothing at a point {b, s, t}: one message for each reason."""
    longest, tp = graph.max_seq_len, point["t"]
    if longest is not None and point["s"] > longest:
        yield f"{graph.name} has positions for {longest} tokens."
    yield from broken(tuple(limit_rules(graph)), {"tp": tp})
    relations = {relation for _, block, _ in _blocks(graph) for relation in block.domain}
    for relation in sorted(relations, key=str):
        if relation.subs(_values(point)) is sympy.false:
            yield f"the costs of {graph.name} were traced for {relation} only."


def print_trace(graph: ModelGraph, point: Point | None) -> None:
    """Each distinct block with its costs as expressions, or at a point."""
    say(
        f"{graph.name}: {graph.num_params:,} parameters"
        f"{trained_words(graph.num_params, graph.num_trainable)}, {graph.num_layers} layers, "
        f"{graph.precision}; b micro-batch, s sequence, t tensor-parallel degree"
    )
    rows = []
    for name, block, repeat in _blocks(graph):
        costs = _costs(graph, block)
        shown = costs if point is None else _at(costs, point)
        rows += [
            (name if i == 0 else "", str(repeat) if i == 0 else "", key, str(value))
            for i, (key, value) in enumerate(shown.items())
        ]
        for mode, sequence_parallel in MODES.items():
            for text in _exchanged(block, point, sequence_parallel):
                rows.append(("", "", mode, text))
        for relation in block.domain:
            rows.append(("", "", "holds where", str(relation)))
    show(
        "Distinct blocks (bytes and FLOPs of one rank)", ("block", "repeat", "cost", "value"), rows
    )
    for note in graph.notes:
        say_note(note)


def trace_json(graph: ModelGraph, point: Point | None) -> dict[str, object]:
    """`blocks`: name, repeat, costs and collectives; expressions as text, numbers at a point."""
    return {
        "name": graph.name,
        "params": graph.num_params,
        "trainable_params": graph.num_trainable,
        "layers": graph.num_layers,
        "precision": graph.precision,
        "fingerprint": graph.fingerprint,
        "at": dict(point) if point else None,
        "blocks": [_block_json(graph, *row, point) for row in _blocks(graph)],
        "notes": list(graph.notes),
    }


def _block_json(
    graph: ModelGraph, name: str, block: Block, repeat: int, point: Point | None
) -> dict[str, object]:
    costs = _costs(graph, block)
    values = (
        {key: str(value) for key, value in costs.items()} if point is None else _at(costs, point)
    )
    domain = [str(relation) for relation in block.domain]
    collectives = {
        mode: [
            {"kind": c.kind, "phase": c.phase, "count": c.count, "bytes": _shown(c.bytes, point)}
            for c in block.collectives(sequence_parallel=sequence_parallel)
        ]
        for mode, sequence_parallel in MODES.items()
    }
    return {
        "name": name,
        "repeat": repeat,
        **values,
        "collectives": collectives,
        "domain": domain,
    }


def _exchanged(block: Block, point: Point | None, sequence_parallel: bool) -> Iterator[str]:
    """What t > 1 ranks exchange in one pass each way, a line for each kind."""
    for each in block.collectives(sequence_parallel=sequence_parallel):
        size = _shown(each.bytes, point)
        yield f"{each.phase}: {each.count} {each.kind.replace('_', '-')} of {size} bytes"


def _shown(expr: sympy.Expr, point: Point | None) -> str | int | float:
    return str(expr) if point is None else _number(expr.subs(_values(point)))


def _blocks(graph: ModelGraph) -> list[tuple[str, Block, int]]:
    repeats = [0] * len(graph.blocks)
    for run in graph.layers:
        repeats[run.block] += run.count
    blocks = [(block.name, block, repeats[i]) for i, block in enumerate(graph.blocks)]
    return [("embed", graph.embed, 1), *blocks, ("head", graph.head, 1)]


def _costs(graph: ModelGraph, block: Block) -> Costs:
    """The six costs of a block, as expressions."""
    numel = sum(
        sympy.Integer(param.num_reals) / (T if param.sharded else 1)
        for param in block.params
        if not param.tied
    )
    many = sympy.expand(sympy.Add(*(tensor.bytes for tensor in block.saved)))
    single = sympy.expand(sympy.Add(*(tensor.bytes for tensor in block.saved_single)))
    same = sympy.expand(many.subs(B, 1) - single) == 0
    saved = many if same else sympy.Piecewise((single, sympy.Eq(B, 1)), (many, True))
    return {
        "param_bytes": sympy.Integer(Precision(graph.precision).num_bytes) * numel,
        "flop_forward": sympy.expand(block.flop("forward")),
        "flop_backward": sympy.expand(block.flop("backward")),
        "saved_bytes": saved,
        "boundary_bytes": block.boundary_bytes,
    }


def _at(costs: Costs, point: Point) -> dict[str, int | float]:
    """Costs as numbers; a byte count that is no integer stays a fraction."""
    return {key: _number(expr.subs(_values(point))) for key, expr in costs.items()}


def _values(point: Point) -> dict[sympy.Symbol, int]:
    return {B: point["b"], S: point["s"], T: point["t"]}


def _number(value: sympy.Expr) -> int | float:
    return int(value) if value == int(value) else float(value)


def print_profiles(profiles: Sequence[tuple[ProfileRow, Sequence[FigureRow]]]) -> None:
    """Every figure with its kind and source, then the overview."""
    for profile, figures in profiles:
        rows = [
            (
                row.path,
                "" if row.value is None else f"{row.value:.6g}",
                row.unit,
                row.kind,
                row.source,
            )
            for row in figures
        ]
        title = f"{profile.family} {profile.name}: {profile.what}"
        show(title, ("figure", "value", "unit", "kind", "source"), rows)
    overview = [
        (
            row.name,
            row.family,
            ", ".join(f"{n} {kind}" for kind, n in row.num_by_kind.items()),
            row.what,
        )
        for row, _ in profiles
    ]
    show("Profiles", ("name", "is a", "figures by kind", "what"), overview)


def profiles_json(
    profiles: Sequence[tuple[ProfileRow, Sequence[FigureRow]]],
) -> dict[str, object]:
    """`profiles`: name, family, what, and every figure with value, unit, kind and source."""
    return {
        "profiles": [
            {
                "name": row.name,
                "family": row.family,
                "what": row.what,
                "figures": [
                    {
                        "path": figure.path,
                        "value": figure.value,
                        "unit": figure.unit,
                        "kind": figure.kind,
                        "source": figure.source,
                    }
                    for figure in figures
                ],
            }
            for row, figures in profiles
        ]
    }


def print_machine(machine: Machine) -> None:
    """What was measured, in a few lines: rates, collectives, what a layer costs the host."""
    device, cluster = machine.device, machine.cluster
    say(machine.what)
    rows = [
        (f"matrix products in {name}", f"{law.peak_flop_per_s.value / 1e9:.1f} GFLOP/s at most")
        for name, law in device.gemm.items()
    ]
    rows.append(("memory", f"{device.hbm_bytes_per_s.value / GB:.1f} GB/s at most"))
    rows += [
        (f"{word}, {group} ranks", f"{format_seconds(row[column] * MICROSECOND)} for {size}")
        for word, table in cluster.tables.items()
        for column, group in enumerate(table.groups, start=1)
        for row in table.rows[-1:]
        for size in (format_bytes(row[0]),)
    ]
    rows += [(path, f"{value.value:.4g}") for path, value in machine.values.items()]
    show("Measured", ("what", "how much"), rows)


def print_calibration(
    before: Mapping[str, float],
    after: Mapping[str, float],
    errors_before: Sequence[float],
    errors_after: Sequence[float],
    lessons: Sequence[str],
) -> None:
    """What fitted constants were and are, and how far off each run was and is (log errors).

    `lessons`: what one more run would teach.
    """
    show(
        "Constants fitted",
        ("constant", "before", "after"),
        [(name, f"{before[name]:.4g}", f"{value:.4g}") for name, value in after.items()],
    )
    show(
        "Predicted step over measured",
        ("run", "before", "after"),
        [
            (str(number), f"{exp(old):.3f}", f"{exp(new):.3f}")
            for number, (old, new) in enumerate(zip(errors_before, errors_after, strict=True), 1)
        ],
    )
    for lesson in lessons:
        say_note(lesson)
