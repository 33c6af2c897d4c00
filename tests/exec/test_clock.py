"""The seconds of a part are those within it, of one step."""

import pytest
import torch

from mist.exec.build import step_clock as clock
from mist.exec.build.step_clock import StepClock


def test_parts_add_up_until_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([1.0, 2.0, 10.0, 14.0, 20.0, 20.5])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(ticks))
    found = StepClock(torch.device("cpu"))
    for part in ("forward", "backward", "forward"):
        with found.timing(part):  # type: ignore[arg-type]
            pass
    expected = {"forward": 1.5, "backward": 4.0, "sums": 0.0, "optimizer": 0.0}
    assert found.read() == expected == found.read()
    found.start()
    assert sum(found.read().values()) == 0.0
