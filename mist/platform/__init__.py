"""Platform: what operations, collectives and copies cost, and what a framework keeps and overlaps.

`load_platform` finds and checks the profiles, `OpCosts` prices operations on them, and
`mist.platform.listing` shows every figure with its source.
"""

from mist.platform.cluster import Cluster, Collective
from mist.platform.costs import OpCosts
from mist.platform.device import Device
from mist.platform.quantity import Kind, Quantity
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
    "load_platform",
]
