"""A plan in a notebook: the pictures that the plan alone gives, as the page has them."""

from dataclasses import dataclass
from html import escape
from typing import Final

from mist.plans.plan import Plan
from mist.report.html_page import page_of
from mist.report.plan_report import PlanReport, sheet_of

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
    return ShownPlan(page=page_of(PlanReport(sheet=sheet_of(plan))))
