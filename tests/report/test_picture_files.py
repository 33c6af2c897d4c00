"""Pictures as files: the same bytes each time, every picture and name in them."""

from mist.report.html_page import pictures_of
from mist.report.picture_files import drawn, pictures_png, pictures_svg
from tests.report.sample_reports import sample_report

PICTURES = pictures_of(sample_report())


def test_the_same_pictures_give_the_same_bytes() -> None:
    assert pictures_svg(PICTURES[:1]) == pictures_svg(PICTURES[:1])
    png = pictures_png(PICTURES[:1])
    assert png.startswith(b"\x89PNG")
    assert png == pictures_png(PICTURES[:1])


def test_every_picture_has_a_panel_with_its_title_and_its_series() -> None:
    text = pictures_svg(PICTURES).decode()
    panels = drawn(PICTURES).axes
    assert [axes.get_title(loc="left") for axes in panels] == [each.title for each in PICTURES]
    for picture in PICTURES:
        assert all(name in text for name in picture.series)


def test_a_name_is_no_mathematics() -> None:
    report = sample_report()
    (devices, *_) = pictures_of(report)
    object.__setattr__(devices, "title", "a $ sign and another $")
    assert b"a $ sign and another $" in pictures_svg([devices])
