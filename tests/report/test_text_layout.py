"""Lines, columns and bars: nothing is lost, broken or longer than the screen."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mist.report.text_layout import bar, columns, screen_width, with_marks, wrapped


@pytest.mark.parametrize(("said", "width"), [("80", 80), ("100", 100), ("5", 40), ("", 100)])
def test_the_width_is_what_columns_says(
    monkeypatch: pytest.MonkeyPatch, said: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", said)
    assert screen_width() == width


@given(st.text("abc -.", max_size=200), st.integers(40, 100))
def test_wrapped_lines_keep_every_word_whole(text: str, width: int) -> None:
    lines = wrapped(text, width, 2)
    assert " ".join(lines).split() == text.split()
    assert all(len(line) <= width or len(line.split()) == 1 for line in lines)


def test_the_last_column_goes_on_below_itself() -> None:
    rows = [("a", "bbb", "one two three"), ("aa", "b", "one")]
    assert columns(rows, 18) == ["a   bbb  one two", "         three", "aa  b    one"]
    # Where no word has room, it begins below the row.
    assert columns([("a" * 12, "longest")], 18) == ["a" * 12, "    longest"]


@given(
    st.dictionaries(st.sampled_from("ABCDE"), st.floats(0, 1e12), min_size=1), st.integers(1, 99)
)
def test_a_bar_is_in_proportion(shares: dict[str, float], width: int) -> None:
    """Each part ends within half a column of its place, and the whole is as long as asked."""
    line, total, end = bar(shares, width), sum(shares.values()), 0.0
    if total == 0:
        assert line == ""
        return
    assert len(line) == width
    for letter, share in shares.items():
        end += share
        last = max((i + 1 for i, each in enumerate(line) if each == letter), default=None)
        assert last is None or abs(last - width * end / total) <= 0.5 + 1e-6


def test_negative_parts_take_no_room() -> None:
    assert bar({"C": 3.0, "B": -1.0, "D": 1.0}, 8) == "CCCCCCDD"


def test_marks_stand_between_letters() -> None:
    assert with_marks("aabb", {2: "|", 4: "]"}) == "aa|bb]"
