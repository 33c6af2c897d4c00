"""The invariants of a plan, said of plain data that may be malformed elsewhere.

dp * tp * cp ranks are the devices of a stage; ep divides dp * cp; dp_replicate divides dp, and is 1
or less than dp and from ZeRO-1 on; dp * micro_batch is equal over stages, and times
num_micro_batches it is the global batch; layers are runs that cover the model once; only the last
stage has a head.
"""

from collections.abc import Iterator, Mapping, Sequence

from mist.errors import Fault
from mist.plans.schedules import SCHEDULES
from mist.plans.workload import HeadMode


def plan_faults(data: Mapping[str, object]) -> Iterator[Fault]:
    """Every broken invariant of a plan given as plain data, possibly malformed elsewhere.

    A rule whose fields are missing or of the wrong type is skipped: the schema reports those.
    """
    stages = [(f"stages[{i}]", stage) for i, stage in enumerate(_list(data.get("stages")))]
    if data.get("stages") in ([], ()):
        yield Fault(path="stages", message="a plan has at least one stage")
    for path, stage in stages:
        yield from _stage_faults(path, stage)
    for path, stage in stages[:-1]:
        if stage.get("head") not in (None, HeadMode.NONE):
            yield Fault(path=f"{path}.head", message="only the last stage has a head; use none")
    yield from _chunk_faults(stages, _map(data.get("schedule")))
    yield from _layer_faults(stages)
    yield from _device_faults(stages, _int(_map(data.get("cluster")).get("num_gpus")))
    yield from _estimate_faults(data.get("estimate"), len(stages))
    global_batch = _int(_map(data.get("workload")).get("global_batch"))
    yield from _batch_faults(stages, global_batch, _int(data.get("num_micro_batches")))


_Stages = Sequence[tuple[str, Mapping[str, object]]]


def _map(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[Mapping[str, object]]:
    return [_map(item) for item in value] if isinstance(value, list | tuple) else []


def _int(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _ints(stage: Mapping[str, object], *names: str) -> tuple[int, ...] | None:
    values = [_int(stage.get(name)) for name in names]
    return tuple(v for v in values if v is not None) if None not in values else None


def _runs(value: object) -> list[tuple[int, int]]:
    """The well-formed [first, count] pairs of a list; a malformed one empties it."""
    items = value if isinstance(value, list | tuple) else []
    runs = [(item[0], item[1]) for item in items if _is_run(item)]
    return runs if len(runs) == len(items) else []


def _is_run(item: object) -> bool:
    return (
        isinstance(item, list | tuple)
        and len(item) == 2
        and all(_int(part) is not None for part in item)
    )


def _estimate_faults(estimate: object, num_stages: int) -> Iterator[Fault]:
    """A prediction judges every stage."""
    judged = _map(estimate).get("stages")
    if num_stages and isinstance(judged, list | tuple) and len(judged) != num_stages:
        message = f"{len(judged)} stages judged, but the plan has {num_stages}"
        yield Fault(path="estimate.stages", message=message)


def _stage_faults(path: str, stage: Mapping[str, object]) -> Iterator[Fault]:
    """The rules that one stage keeps alone."""
    yield from _rank_faults(path, stage)
    yield from _replica_faults(path, stage)
    yield from _level_faults(path, stage)


def _rank_faults(path: str, stage: Mapping[str, object]) -> Iterator[Fault]:
    """dp * tp * cp = devices; ep divides dp * cp; sp needs tp."""
    ranks, devices = _ints(stage, "dp", "tp", "cp"), _runs([stage.get("devices")])
    if ranks is None:
        return
    dp, tp, cp = ranks
    if devices and dp * tp * cp != devices[0][1]:
        yield Fault(
            path=f"{path}.devices",
            message=f"dp * tp * cp = {dp} * {tp} * {cp} ranks, "
            f"but the stage has {devices[0][1]} devices",
        )
    ep = _int(stage.get("ep"))
    if ep and dp * cp % ep:
        yield Fault(path=f"{path}.ep", message=f"ep {ep} does not divide dp * cp = {dp * cp}")
    if stage.get("sp") is True and tp == 1:
        yield Fault(path=f"{path}.sp", message="sequence parallelism needs tp > 1")


def _replica_faults(path: str, stage: Mapping[str, object]) -> Iterator[Fault]:
    """dp_replicate divides dp; whoever has copies of the states also divides them."""
    sizes = _ints(stage, "dp", "dp_replicate", "zero")
    if sizes is None or sizes[1] <= 1:
        return
    (dp, copies, zero), where = sizes, f"{path}.dp_replicate"
    if dp % copies:
        yield Fault(path=where, message=f"{copies} copies of the states do not divide dp {dp}")
    elif copies == dp:
        yield Fault(path=where, message=f"a whole copy on each of dp {dp} ranks is zero 0")
    if zero == 0:
        yield Fault(path=where, message="zero 0 has a copy on every rank already; use zero 1 to 3")


def _level_faults(path: str, stage: Mapping[str, object]) -> Iterator[Fault]:
    """A stage has layers, and its memory levels cover all of them."""
    if stage.get("layers") in ([], ()):
        yield Fault(path=f"{path}.layers", message="a stage has at least one run of layers")
    levels = [_int(count) for count in _map(stage.get("memory")).values()]
    num_levels = sum(count for count in levels if count is not None)
    num_layers = sum(count for _, count in _runs(stage.get("layers")))
    if num_layers and None not in levels and num_levels != num_layers:
        yield Fault(
            path=f"{path}.memory",
            message=f"levels cover {num_levels} layers, but the stage has {num_layers}",
        )


def _chunk_faults(stages: _Stages, schedule: Mapping[str, object]) -> Iterator[Fault]:
    """Chunks come with the schedules that take turns among them, one run of layers each."""
    kind, vpp = schedule.get("kind"), _int(schedule.get("vpp"))
    if vpp is None:
        return
    for row in (row for each, row in SCHEDULES.items() if each == kind):
        if vpp > 1 and not row.takes_turns:
            words = f"{kind} runs one chunk per stage, found {vpp}"
            yield Fault(path="schedule.vpp", message=words)
        if vpp < row.least_chunks:
            words = f"{kind} needs at least {row.least_chunks} chunks per stage"
            yield Fault(path="schedule.vpp", message=words)
    for path, stage in stages:
        runs = _runs(stage.get("layers"))
        if runs and len(runs) != vpp:
            words = f"{len(runs)} runs of layers, but the schedule has {vpp} per stage"
            yield Fault(path=f"{path}.layers", message=words)


def _layer_faults(stages: _Stages) -> Iterator[Fault]:
    """The first runs of all stages follow one another from layer 0, then the second ones, ..."""
    runs = [(f"{path}.layers", _runs(stage.get("layers"))) for path, stage in stages]
    expected = 0
    for chunk in range(max((len(own) for _, own in runs), default=0)):
        for path, own in runs:
            for first, count in own[chunk : chunk + 1]:
                if count < 1:
                    yield Fault(path=path, message=f"a run of {count} layers")
                yield from _order_fault(path, (first, count), expected)
                expected = first + count


def _device_faults(stages: _Stages, num_gpus: int | None) -> Iterator[Fault]:
    """Device ranges follow one another from device 0 and cover the cluster."""
    expected = 0
    for path, stage in stages:
        for first, count in _runs([stage.get("devices")]):
            yield from _order_fault(f"{path}.devices", (first, count), expected)
            expected = first + count
    if num_gpus is not None and expected not in (0, num_gpus):
        yield Fault(
            path="cluster.num_gpus",
            message=f"the stages use {expected} devices, the cluster has {num_gpus}",
        )


def _order_fault(path: str, run: tuple[int, int], expected: int) -> Iterator[Fault]:
    """A run [first, count] that does not start where the one before ended."""
    what = path.rpartition(".")[2]
    if run[0] != expected and expected == 0:
        yield Fault(path=path, message=f"{what} {list(run)} do not start at 0")
    elif run[0] != expected:
        verb = "overlap" if run[0] < expected else "leave a gap after"
        yield Fault(
            path=path,
            message=f"{what} {list(run)} {verb} those before, which end at {expected - 1}",
        )


def _batch_faults(
    stages: _Stages, global_batch: int | None, num_micro_batches: int | None
) -> Iterator[Fault]:
    """dp * micro_batch is equal over stages, and times G it is the global batch."""
    samples = [(path, _ints(stage, "dp", "micro_batch")) for path, stage in stages]
    known = [(path, pair[0] * pair[1]) for path, pair in samples if pair]
    for path, count in known[1:]:
        if count != known[0][1]:
            yield Fault(
                path=f"{path}.micro_batch",
                message=f"dp * micro_batch = {count}, but {known[0][1]} in the first stage",
            )
    if known and global_batch and num_micro_batches:
        total = known[0][1] * num_micro_batches
        if total != global_batch:
            yield Fault(
                path="num_micro_batches",
                message=f"dp * micro_batch * num_micro_batches = {known[0][1]} * "
                f"{num_micro_batches} = {total}, but the global batch is {global_batch}",
            )
