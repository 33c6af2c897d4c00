"""Runtimes as some runs use them, where no profile of their own says it.

What is known of a framework stays; what these runs do with its states is put in its place. Nothing
was fitted to such runs: their interval is that of a platform without a calibration.
"""

from dataclasses import replace
from typing import Final

from mist.plans.provenance import Kind
from mist.platform.quantity import Quantity
from mist.platform.runtime import Runtime
from mist.platform.states import StateItem, StateRow

# Words of `precision` for frozen weights in four bits: codes, and what scales blocks of 64 of them.
CODED_BYTES: Final = Quantity(
    value=0.516,
    source="NF4, scales in 8 bits: 4 + 8/64 + 32/16384 bits a weight (QLoRA, arXiv 2305.14314)",
    kind=Kind.SPEC,
)
GATHERED: Final = Quantity(
    value=2.0, source="as FSDP2: the next layer is gathered while one runs", kind=Kind.GUESS
)
REDUCED: Final = Quantity(
    value=6.0, source="as FSDP2: a layer's gradient and its fp32 copy", kind=Kind.GUESS
)
FULL: Final = 3  # the ZeRO level of whole sharding


def fully_sharded(runtime: Runtime) -> Runtime:
    """A runtime whose ranks divide all states at ZeRO-3, and gather layer by layer (Megatron-FSDP).

    A runtime that has ZeRO-3 stays as it is.
    """
    if FULL in runtime.knobs.zero_levels:
        return runtime
    states = {
        item: tuple(_divided(row, max(runtime.knobs.zero_levels)) for row in rows)
        for item, rows in runtime.states.items()
    }
    transients = replace(
        runtime.transients,
        num_gathered_groups=GATHERED,
        reduce_bytes_per_param=dict.fromkeys(runtime.reduce_bytes, REDUCED),
    )
    knobs = replace(runtime.knobs, zero_levels=(*runtime.knobs.zero_levels, FULL))
    return replace(runtime, states=states, transients=transients, knobs=knobs)


def _divided(row: StateRow, highest: int) -> StateRow:
    """A row of states that also holds at ZeRO-3, as at the highest level of its runtime."""
    levels = row.zero_levels
    if highest in levels and FULL not in levels:
        levels = (*levels, FULL)
    shared = FULL if row.sharded_from is None else row.sharded_from
    return replace(row, sharded_from=shared, zero_levels=levels)


def with_coded_weights(runtime: Runtime) -> Runtime:
    """A runtime whose frozen weights are codes of four bits (QLoRA).

    That they become 16-bit numbers before each product is not priced.
    """
    states = {
        item: tuple(
            replace(row, frozen_bytes_per_param=CODED_BYTES)
            if item is StateItem.WEIGHTS or row.frozen_bytes_per_param is not None
            else row
            for row in rows
        )
        for item, rows in runtime.states.items()
    }
    return replace(runtime, states=states)
