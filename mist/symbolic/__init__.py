"""Symbolic room: a traced model and a runtime -> time and memory of any stage, as expressions."""

from mist.symbolic.compile import CompiledStageCost, compile_stage_cost
from mist.symbolic.stage import MEMORY_PARTS, TIME_PARTS, StageCost, stage_cost

__all__ = [
    "MEMORY_PARTS",
    "TIME_PARTS",
    "CompiledStageCost",
    "StageCost",
    "compile_stage_cost",
    "stage_cost",
]
