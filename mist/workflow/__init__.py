"""What joins the rooms: plan and check, as the command line and the Python API ask them."""

from mist.workflow.checking import Checked, HandLayout, check_layout, check_plan
from mist.workflow.planning import Planned, make_plan
from mist.workflow.question import Question, prepare

__all__ = [
    "Checked",
    "HandLayout",
    "Planned",
    "Question",
    "check_layout",
    "check_plan",
    "make_plan",
    "prepare",
]
