"""The orders in which torch itself runs micro-batches, made without processes or models."""

from collections.abc import Sequence
from types import SimpleNamespace

from torch.distributed.pipelining import schedules

Orders = dict[int, list[schedules._Action | None]]

SCHEDULES = {
    "interleaved": schedules.ScheduleInterleaved1F1B,
    "zero-bubble": schedules.ScheduleInterleavedZeroBubble,
}


def pipeline_order(
    kind: str, num_stages: int, num_micro_batches: int, chunks: int
) -> Orders | None:
    """What each rank does, in order; None where torch refuses the number of micro-batches."""
    stages = [
        SimpleNamespace(
            num_stages=num_stages * chunks,
            group_size=num_stages,
            group_rank=0,
            stage_index=chunk * num_stages,
            is_first=chunk == 0,
            is_last=False,
            has_backward=True,
            submod=None,
        )
        for chunk in range(chunks)
    ]
    try:
        return SCHEDULES[kind](stages, num_micro_batches, loss_fn=lambda *_: None).pipeline_order
    except ValueError as error:
        assert "number of rounds" in str(error)
        return None


def most_held(actions: list[schedules._Action | None], layers: Sequence[int] | None = None) -> int:
    """Largest number of chunks whose activations a rank holds at once: from forward to weights.

    Or of their layers, given how many each chunk of the pipeline has.
    """
    held: dict[tuple[int, int | None], int] = {}
    most = 0
    for action in filter(None, actions):
        chunk = (action.stage_index, action.microbatch_index)
        match action.computation_type.name:
            case "FORWARD":
                held[chunk] = layers[action.stage_index] if layers else 1
            case "FULL_BACKWARD" | "BACKWARD_WEIGHT":
                del held[chunk]
        most = max(most, sum(held.values()))
    return most


def ends_held(
    actions: list[schedules._Action | None], num_stages: int, chunks: int
) -> tuple[int, int, int]:
    """The most micro-batches of the first and of the last chunk that a rank holds, and that wait.

    Of the last one from forward to backward, counted as backward passes begin: its logits live so
    long; those that wait for gradients of weights as another one begins backward.
    """
    embed, head, waiting = set(), set(), set()
    most = [0, 0, 0]
    for action in filter(None, actions):
        at, kind = (action.stage_index, action.microbatch_index), action.computation_type.name
        if kind == "FORWARD":
            embed |= {at} if action.stage_index == 0 else set()
            head |= {at} if action.stage_index == num_stages * chunks - 1 else set()
            continue
        if kind != "BACKWARD_WEIGHT":
            held = (len(embed), len(head), len(waiting))
            most = [max(pair) for pair in zip(most, held, strict=True)]
            head.discard(at)
        if kind == "BACKWARD_INPUT":
            waiting.add(at)
        else:
            waiting.discard(at)
            embed.discard(at)
    return tuple(most)
