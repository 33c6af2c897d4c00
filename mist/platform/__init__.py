"""Platform: what operations, collectives and copies cost, and what a framework keeps and overlaps.

`load_platform` finds and checks the profiles, and `OpCosts` prices operations on them. `op_costs`
says by which law or table, `extrapolations` how far from measurements. `mist.platform.listing` has
every figure with its source.
"""

from mist.plans.provenance import Kind
from mist.platform.cluster import Cluster, Collective
from mist.platform.device import Device
from mist.platform.extrapolation import extrapolations
from mist.platform.op_sources import op_costs
from mist.platform.op_times import OpCosts
from mist.platform.quantity import Quantity
from mist.platform.runtime import Runtime
from mist.platform.selection import Platform, load_platform

__all__ = [
    "Cluster",
    "Collective",
    "Device",
    "Kind",
    "OpCosts",
    "Platform",
    "Quantity",
    "Runtime",
    "extrapolations",
    "load_platform",
    "op_costs",
]
