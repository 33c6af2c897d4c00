"""What is said of a plan: which limits bind, over which links, and what more would bring."""

from mist.plans.plan import Limits
from mist.report.explanation import (
    Explanation,
    SearchedAgain,
    bindings_of,
    explanation_lines,
    explanation_pictures,
)
from mist.units import GIB
from tests.sample_plans import HOST, LIMITS, host_need, sample_plan


def again(name: str, step_s: float | None, words: str = "pp1 dp8") -> SearchedAgain:
    tokens_per_s = 1000.0 / step_s if step_s else 0.0
    return SearchedAgain(name=name, step_s=step_s, tokens_per_s=tokens_per_s, words=words)


EXPLAINED = Explanation(
    bindings=("GPU memory binds on stage 1",),
    now=again("now", 4.0),
    marginals=(
        again("1 GiB more memory per GPU", 3.2),
        again("10 % more bandwidth between nodes", 4.0),
        again("one more node (16 GPUs)", None, "--global-batch 32: no factors"),
    ),
    ladder=(again("3d", 8.0), again("+ZeRO", 4.0), again("+offload", None, "nothing fits")),
)


def test_what_binds_by_hand() -> None:
    # 48 of 64 GiB; tp takes 8 * 0.125 s of 5 s; once per step and the bubble by hand: 5 - 4.25.
    assert list(bindings_of(sample_plan(), LIMITS, HOST)) == [
        "GPU memory does not bind: on the fullest stage, 1, 16.0 GiB of 64.0 GiB are left",
        "Tensor-parallel collectives take 20.0% of the step: axis tp, over links inside a node",
        "Pipeline bubble and imbalance takes 15.0% of the step",
        "Computation itself takes 60.0% of the step",
    ]


def test_memory_that_binds() -> None:
    tight = Limits(device_bytes=49.0 * GIB, host_bytes=0.0)
    first, second, *_ = bindings_of(sample_plan(), tight, host_need(held_gib=250))
    assert first == "GPU memory binds on stage 1: 1.0 GiB of 49.0 GiB are left"
    assert second == "Host memory binds: 250.0 GiB of 256.0 GiB per node are used"


def test_lines_say_gains_reasons_and_rungs() -> None:
    lines = explanation_lines(sample_plan(), EXPLAINED, 100)
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert "  1 GiB more memory per GPU          3.20 s  +25.0% tokens/s  pp1 dp8" in text
    assert "  10 % more bandwidth between nodes  4.00 s  no gain" in text
    assert "  one more node (16 GPUs)            -       -" in text
    assert "pp1 dp8 tp1 (+20.0%): +1.00 s tensor-parallel collectives; ties if" in text
    assert f"  3d        [{'#' * 30}]  8.00 s  pp1 dp8" in text
    assert f"  +ZeRO     [{'#' * 15}{' ' * 15}]  4.00 s  pp1 dp8" in text
    assert f"  +offload  [{' ' * 30}]  -       nothing fits" in text


def test_pictures_leave_out_what_does_not_fit() -> None:
    ladder, marginal = explanation_pictures(EXPLAINED)
    assert ladder.row_names == ("3d", "+ZeRO")
    assert [shape.x2 for shape in ladder.shapes] == [8.0, 4.0]
    assert [shape.x2 for shape in marginal.shapes] == [250.0, 312.5, 250.0]
