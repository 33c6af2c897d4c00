"""A plan in a notebook: a frame of its own, which can do nothing but draw."""

import html

import mist.report
from tests.sample_plans import sample_plan


def test_a_plan_is_shown_in_a_frame() -> None:
    text = mist.report.show(sample_plan())._repr_html_()
    assert text.startswith("<iframe sandbox='allow-scripts'")
    page = html.unescape(text.partition('srcdoc="')[2].removesuffix('"></iframe>'))
    # 12 % of 72 GiB stay free: 63.4 GiB less the peak of 48.
    assert "FITS, with 15.4 GiB to spare" in page
    assert "From the ideal step to the predicted one" in page
