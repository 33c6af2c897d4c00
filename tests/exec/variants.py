"""The layouts that must agree with one process."""

from mist.plans import Offload
from mist.spec import ScheduleKind
from tests.exec.layouts import S, Variant

GPIPE, INTERLEAVED = ScheduleKind.GPIPE, ScheduleKind.INTERLEAVED
ZERO_BUBBLE = ScheduleKind.ZERO_BUBBLE

VARIANTS = (
    *(Variant(name=f"zero{z}", stages=(S(dp=2, zero=z),)) for z in range(4)),
    *(Variant(name=f"zero{z} accumulated", stages=(S(dp=2, zero=z),), micro=4) for z in range(4)),
)
