"""Mist plans how to train a PyTorch model on a cluster.

    import mist
    plan = mist.plan("llama3-8b", gpus=16)
    mist.save_plan(plan, "plan.yaml")
    judged = mist.check("llama3-8b", gpus=16, tp=2, pp=2, zero=1, checkpoint="full")
    judged.fits, judged.margin_bytes

Everything is imported when it is first used.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mist.plans.file import load_plan, save_plan
    from mist.workflow.api import check, plan

__all__ = ["check", "load_plan", "plan", "save_plan"]

_HOME = {
    "check": "mist.workflow.api",
    "plan": "mist.workflow.api",
    "load_plan": "mist.plans.file",
    "save_plan": "mist.plans.file",
}


def __getattr__(name: str) -> object:
    """The functions of the Python API, from the module that holds each."""
    if name not in _HOME:
        raise AttributeError(f"module 'mist' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
