"""A plan in a notebook: the pictures that the plan alone gives, as the page has them."""

from dataclasses import dataclass
from html import escape
from typing import Final

from mist.plans.host_memory import HostNeed
from mist.plans.plan import Limits, Plan, fullest_host_bytes
from mist.plans.provenance import Kind
from mist.report.html_page import page_of
from mist.report.plan_report import PlanReport
from mist.report.plan_screen import Sheet

HEIGHT_PX: Final = 640


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownPlan:
    """What a notebook shows at the end of a cell: the page in a frame of its own."""

    page: str

    def _repr_html_(self) -> str:
        """The frame; styles and scripts of the page stay inside of it."""
        style = f"width:100%;height:{HEIGHT_PX}px;border:0"
        words = "sandbox='allow-scripts' title='Mist plan'"
        return f'<iframe {words} style="{style}" srcdoc="{escape(self.page)}"></iframe>'


def show(plan: Plan) -> ShownPlan:
    """Pictures of a plan for a notebook; `mist report` draws more, with the model at hand."""
    return ShownPlan(page=page_of(PlanReport(sheet=_sheet(plan))))


def _sheet(plan: Plan) -> Sheet:
    """What may be used, as far as the plan says it: its margin, and what it has on the host."""
    margin = plan.provenance.search.get("margin", 0.0)
    usable_bytes = plan.estimate.stages[0].usable_bytes
    hosted = [stage.host_bytes for stage in plan.estimate.stages]
    held_bytes = round(fullest_host_bytes(plan.stages, hosted, plan.cluster.gpus_per_node))
    share = 1.0 - (margin if isinstance(margin, float) else 0.0)
    return Sheet(
        plan=plan,
        limits=Limits(device_bytes=share * usable_bytes, host_bytes=float(held_bytes)),
        host=HostNeed(
            held_bytes=held_bytes,
            loading_bytes=None,
            drawn_bytes=None,
            memory_bytes=max(held_bytes, 1),
            limit_bytes=held_bytes,
            kind=Kind.GUESS,
            source="the plan, which was made within the memory of its nodes",
        ),
    )
