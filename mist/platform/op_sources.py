"""Which law or table prices each kind of operation, and how sure it is: rows for a plan."""

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Final

from mist.plans.plan import How, OpCost
from mist.plans.provenance import Sourced, weakest
from mist.platform.op_tables import TabledOp
from mist.platform.op_times import OpCosts
from mist.platform.quantity import Quantity

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

WHAT: Final = {
    TabledOp.GEMM: "matrix products",
    TabledOp.ATTENTION_FORWARD: "attention forward",
    TabledOp.ATTENTION_BACKWARD: "attention backward",
}


def op_costs(costs: OpCosts, *, num_gpus: int, num_nodes: int) -> tuple[OpCost, ...]:
    """A row for each kind of operation that a job of so many GPUs and nodes may have."""
    between_gpus = _between_gpus(costs) if num_gpus > 1 else ()
    rows = [*_on_device(costs), *between_gpus]
    if num_nodes > 1:
        network = _quantities(costs.cluster.network)
        rows.append(_by_law("collectives and transfers between nodes", *network))
    return (*rows, *_at_once(costs))


def _on_device(costs: OpCosts) -> Iterator[OpCost]:
    device = costs.device
    for op in TabledOp:
        table = costs.table(op)
        if table is None:
            yield _by_law(WHAT[op], *_figures(costs, op))
        else:
            yield _row(WHAT[op], "measured" if table.own else "table", table, *_scale(costs))
    yield _by_law(
        "memory-bound operations",
        *_quantities(device.bandwidth_ratio),
        device.hbm_bytes_per_s,
        device.kernel_launch_s,
    )


def _between_gpus(costs: OpCosts) -> Iterator[OpCost]:
    tables, links = tuple(costs.cluster.tables.values()), costs.cluster.links
    if tables:
        yield _row("collectives in a node", "table", *tables)
    if links:
        groups = ", ".join(str(link.group) for link in links)
        what = "collectives in a node" + (f" of {groups} ranks" if tables else "")
        yield _by_law(what, *(figure for link in links for figure in _quantities(link)))
    yield _by_law("transfers in a node", *_quantities(costs.cluster.p2p_in_node))


def _at_once(costs: OpCosts) -> Iterator[OpCost]:
    """Copies, and what runs at the same time as computation."""
    device, contention = costs.device, costs.cluster.contention
    yield _by_law(
        "copies between host and device",
        device.host_to_device_bytes_per_s,
        device.device_to_host_bytes_per_s,
    )
    yield _by_law("streams at once", contention or costs.runtime.overlap.compute_slowdown_ratio)


def _figures(costs: OpCosts, op: TabledOp) -> Iterator[Sourced]:
    """What the law of an operation is made of."""
    device, flash = costs.device, costs.device.flash_attention
    if op is TabledOp.GEMM:
        yield from _quantities(costs.gemm_law)
    elif op is TabledOp.ATTENTION_FORWARD:
        yield from (figure for law in flash.laws for figure in _quantities(law))
        yield from (flash.full_mask_ramp_ratio, device.gemm[costs.numerics.compute].peak_flop_per_s)
    else:
        forward = costs.table(TabledOp.ATTENTION_FORWARD)
        yield from (flash.backward_ratio, flash.backward_ramp_tokens, flash.backward_min_tokens)
        yield from (forward,) if forward else _figures(costs, TabledOp.ATTENTION_FORWARD)
    yield from _scale(costs)


def _scale(costs: OpCosts) -> Iterator[Quantity]:
    """The calibrated scale of these times; before calibration it is 1 and changes nothing."""
    if costs.device.tensor_time_scale.value != 1.0:
        yield costs.device.tensor_time_scale


def _quantities(record: "DataclassInstance") -> Iterator[Quantity]:
    """The figures of a record, in the order of its fields."""
    values = (getattr(record, item.name) for item in fields(record))
    yield from (value for value in values if isinstance(value, Quantity))


def _by_law(what: str, *figures: Sourced) -> OpCost:
    return _row(what, "law", *figures)


def _row(what: str, how: How, *figures: Sourced) -> OpCost:
    figure = weakest(figures)
    return OpCost(what=what, how=how, source=figure.source, kind=figure.kind)
