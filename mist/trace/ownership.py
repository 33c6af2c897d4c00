"""What of a module each part of a run owns: parameters, and tensors that are held as they are.

A layer owns what it contains; what several layers contain belongs to the first of them. Outside the
layers a parameter belongs where it is first read; a later use is tied. Buffers are held in their
own dtype, as are weights stored as codes (8 bits or less): no optimizer ever sees either.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mist.trace.recording.recorded_run import Piece, RecordedRun
from mist.trace.runs import Recorded

Named = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Owned:
    """What a part owns: parameters (name, tensor, tied), and bytes of buffers and codes."""

    params: tuple[tuple[str, torch.Tensor, bool], ...]
    buffer_bytes: int


def owned_parts(module: nn.Module, result: Recorded) -> list[Owned]:
    """What the embedding, the head and each distinct layer own."""
    run, layers = result.run, result.layers.modules if result.layers else ()
    inside = {id(tensor) for layer in layers for _, tensor in _tensors(layer)}
    outside = [(name, tensor) for name, tensor in _tensors(module) if id(tensor) not in inside]
    ends = (run.embed, run.head)
    read = {id(piece): _read_by(piece, run) for piece in ends}
    # What nothing reads is held from the start on.
    first = run.embed if layers else run.head
    read[id(first)] |= {id(tensor) for _, tensor in outside}.difference(*read.values())
    owned: dict[int, Owned] = {}
    known: set[int] = set()
    for piece in ends:
        of_piece = [(name, t) for name, t in outside if id(t) in read[id(piece)]]
        owned[id(piece)] = _owned(of_piece, known)
        known |= read[id(piece)]
    for piece in run.layers:
        assert piece.module is not None
        tensors = [(name, t) for name, t in _tensors(piece.module) if id(t) not in known]
        owned[id(piece)] = _owned(tensors, known)
        known |= {id(tensor) for _, tensor in tensors}
    return [owned[id(piece)] for piece in (run.embed, run.head, *run.layers)]


def _owned(tensors: Named, known: set[int]) -> Owned:
    held = [
        tensor for _, tensor in tensors if not _is_trainable(tensor) and id(tensor) not in known
    ]
    return Owned(
        params=tuple((name, t, id(t) in known) for name, t in tensors if _is_trainable(t)),
        buffer_bytes=sum(tensor.numel() * tensor.element_size() for tensor in held),
    )


def _is_trainable(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a parameter in a precision that is computed in."""
    plain = tensor.is_floating_point() or tensor.is_complex()
    return isinstance(tensor, nn.Parameter) and plain and tensor.element_size() > 1


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _read_by(piece: Piece, run: RecordedRun) -> set[int]:
    return {id(run.originals[key]) for key in piece.part.used}


def unread_note(module: nn.Module, result: Recorded) -> Iterator[str]:
    """The parameters that nothing reads, by the outermost modules that hold nothing else."""
    run, layers = result.run, result.layers.modules if result.layers else ()
    read = set[int]().union(*(_read_by(piece, run) for piece in run.pieces))
    kinds = [piece.module for piece in run.layers if piece.module is not None]
    # Of layers of one kind only the first ran: what it does not read the others do not, either.
    idle = {name for kind in kinds for name, p in kind.named_parameters() if id(p) not in read}
    for layer in layers:
        read |= {id(p) for name, p in layer.named_parameters() if name not in idle}
    unread = {id(p): p.numel() for p in module.parameters() if id(p) not in read}
    if unread:
        names = list(_names_of(module, "", unread.keys()))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield (
            f"{sum(unread.values()):,} parameters are charged that nothing reads in this batch: "
            f"{', '.join(names[:3])}{more}"
        )


def _names_of(module: nn.Module, name: str, unread: Iterable[int]) -> Iterator[str]:
    own: Sequence[nn.Parameter] = list(module.parameters())
    if own and all(id(p) in unread for p in own):
        yield name
        return
    dot = f"{name}." if name else ""
    for key, parameter in module.named_parameters(recurse=False):
        if id(parameter) in unread:
            yield f"{dot}{key}"
    for key, child in module.named_children():
        yield from _names_of(child, f"{dot}{key}", unread)
