"""How often the activation of a part enters and leaves what tensor parallelism divides."""

from collections.abc import Collection, Iterator
from typing import Final

import torch
from sympy import Expr
from torch import nn

from mist.model.graph import Param
from mist.trace.recording.recorded_part import Entered
from mist.trace.recording.recorded_run import Piece, RecordedRun
from mist.trace.tensor_parallel.tp_sharding import DividedRegion, Sharding

EMBEDDINGS: Final = (torch.ops.aten.embedding.default,)


def crossings(
    piece: Piece, params: tuple[Param, ...], sharding: Sharding | None, run: RecordedRun
) -> dict[str, int]:
    """Entries and exits, those that gradients go back through, and what is whole: see `Block`."""
    counts = {"num_entries": 0, "num_exits": 0, "num_entries_back": 0, "num_exits_back": 0}
    if sharding is None:
        return counts | {"num_whole": 0}
    if piece.module is not None:
        return _of_layer(piece, piece.module, sharding)
    divided = any(param.sharded for param in params)
    # An end that is whole takes and gives all tokens, too; each rank has its part of the gradient.
    if piece is run.head:
        ends = {"num_entries": 1, "num_entries_back": int(divided and piece.flows)}
    else:
        trained = any(param.trainable for param in params)
        # An encoder's table is read for a decoder's tokens, too.
        exits = max(_num_divided_reads(run, sharding), 1) * divided
        ends = {"num_exits": exits, "num_exits_back": max(exits, 1) * trained}
    return counts | ends | {"num_whole": 0}


def _num_divided_reads(run: RecordedRun, sharding: Sharding) -> int:
    """How often a table that is divided is read before the first layer and between two lists."""
    calls = (node for node in run.embed.part.graph.nodes if node.target in EMBEDDINGS)
    tables = (run.originals.get(call.args[0].meta.get("key")) for call in calls)
    return sum(id(table) in sharding.params for table in tables)


def _of_layer(piece: Piece, layer: nn.Module, sharding: Sharding) -> dict[str, int]:
    """A region has an exit for each of its ends; a tensor enters all that read it at once.

    Regions in a module that needs all tokens count as one. An input that no hook sees (experts)
    enters with the layer's input.
    """
    whole = _whole_modules(layer, sharding)
    inside = [_ends_in(m, sharding) for m in whole]
    num_joint = sum(1 for ends in inside if ends)
    goes_back = any(op.phase == "backward" for op in piece.part.ops)
    regions = list(_free_regions(layer, sharding))
    entered, back = _entered(piece, regions), _entered(piece, regions, flows=True)
    # Without a hook the layer's own input stands for what enters.
    unseen = sum(not region.entered & piece.part.entered.keys() for region in regions)
    return {
        "num_entries": num_joint + len(entered) + unseen,
        "num_exits": num_joint + sum(len(region.ends) for region in regions),
        "num_entries_back": num_joint * goes_back + len(back) + unseen * piece.flows,
        "num_exits_back": num_joint * goes_back + sum(_exits_back(piece, r) for r in regions),
        "num_whole": sum(1 for ends in inside if not ends),
    }


def _whole_modules(layer: nn.Module, sharding: Sharding) -> list[nn.Module]:
    return [m for m in layer.modules() if id(m) in sharding.whole]


def _ends_in(module: nn.Module, sharding: Sharding) -> set[int]:
    return {id(inner) for inner in module.modules()} & sharding.ends


def _free_regions(layer: nn.Module, sharding: Sharding) -> Iterator[DividedRegion]:
    """The regions of a layer that are in no module which needs all tokens."""
    joint = (_ends_in(module, sharding) for module in _whole_modules(layer, sharding))
    here = {id(m) for m in layer.modules()}.difference(*joint)
    return (region for region in sharding.regions if region.ends <= here)


def _exits_back(piece: Piece, region: DividedRegion) -> int:
    """The ends of a region that a gradient goes back through."""
    flows, seen = piece.part.flows, region.entered & piece.part.entered.keys()
    goes_back = bool(seen & flows) if seen else piece.flows
    return len(region.ends if goes_back else region.ends & flows)


def other_entries_back(
    piece: Piece, sharding: Sharding | None, run: RecordedRun
) -> tuple[Expr, ...]:
    """Bytes of what enters regions and has a gradient, where it is no activation of the layer.

    As a table of relative positions, which every layer projects for itself, or what a head makes
    narrow before its scores.
    """
    if sharding is None:
        return ()
    layer = run.layers[run.kinds[-1]] if piece is run.head and run.layers else piece
    sizes = (entry.bytes for entry in _entered_back(piece, sharding, run))
    return tuple(size for size in sizes if size != layer.boundary_bytes)


def _entered_back(piece: Piece, sharding: Sharding, run: RecordedRun) -> Collection[Entered]:
    """What enters regions of a layer, or the divided head, and has a gradient."""
    if piece is run.head:
        known = piece.part.entered.keys() & piece.part.flows
        return {e for each in sharding.colwise & known for e in piece.part.entered[each]}
    if piece.module is None:
        return ()
    return _entered(piece, list(_free_regions(piece.module, sharding)), flows=True)


def _entered(
    piece: Piece, regions: Collection[DividedRegion], *, flows: bool = False
) -> Collection[Entered]:
    """What enters regions, or of that what has a gradient; a tensor that several read once."""
    part = piece.part
    known = part.entered.keys() & part.flows if flows else part.entered.keys()
    return {e for region in regions for each in region.entered & known for e in part.entered[each]}
