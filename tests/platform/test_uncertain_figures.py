"""Draws of what a platform may be: spread evenly, within their ends, each figure felt."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from mist.plans.provenance import Kind
from mist.platform.calibration import Profiles, figure_at
from mist.platform.profiles import load_shipped
from mist.platform.quantity import Quantity
from mist.platform.selection import load_platform
from mist.platform.uncertain_figures import (
    NUM_DRAWS,
    UncertainFigure,
    UncertainFigures,
    drawn_profiles,
    pessimistic_profiles,
)

LINK = "link to host memory"


def profiles_of(cluster: str, runtime: str = "torch") -> Profiles:
    platform = load_platform(num_gpus=16, gpu=None, cluster=cluster, runtime=runtime)
    return platform.device, platform.cluster, platform.runtime


def rows() -> dict[str, UncertainFigure]:
    return {row.name: row for row in load_shipped("ranges.yaml", UncertainFigures).figures}


def value(profiles: Profiles, path: str) -> float:
    return figure_at(profiles, path).value


def changed(before: Profiles, after: Profiles) -> Iterator[str]:
    """Rows whose first figure differs."""
    for name, row in rows().items():
        if value(before, row.paths[0]) != value(after, row.paths[0]):
            yield name


def test_each_figure_takes_each_of_its_places_once() -> None:
    profiles = profiles_of("dgx-h100")
    draws = drawn_profiles(profiles)
    assert len(draws) == NUM_DRAWS
    for name in (LINK, "slowdown of compute under communication"):
        row = rows()[name]
        scale = value(profiles, row.paths[0]) if row.by == "factor" else 1.0
        drawn = sorted(value(draw, row.paths[0]) / scale for draw in draws)
        low, high = row.ends
        middles = low + (np.arange(NUM_DRAWS) + 0.5) / NUM_DRAWS * (high - low)
        assert drawn == pytest.approx(middles.tolist())


def test_no_two_figures_move_together() -> None:
    draws = drawn_profiles(profiles_of("dgx-h100"))
    paths = {rows()[name].paths[0] for name in changed(profiles_of("dgx-h100"), draws[0])}
    columns = [[value(draw, path) for draw in draws] for path in sorted(paths)]
    relation = np.corrcoef(np.array(columns)) - np.eye(len(paths))
    assert len(paths) >= 4
    assert np.abs(relation).max() < 0.5


def test_both_directions_of_the_link_move_together() -> None:
    before = profiles_of("dgx-h100")
    for draw in drawn_profiles(before):
        factors = [value(draw, path) / value(before, path) for path in rows()[LINK].paths]
        assert factors[0] == pytest.approx(factors[1])


def test_what_was_measured_at_once_is_not_drawn() -> None:
    before = profiles_of("gcp-l4-8")
    assert before[1].contention is not None
    names = set(changed(before, pessimistic_profiles(before)))
    assert LINK not in names
    assert "slowdown of compute under communication" not in names
    assert any(name.startswith("share of the network") for name in names)


def test_the_worse_end_is_the_slower_one() -> None:
    before = profiles_of("dgx-h100")
    after = pessimistic_profiles(before)
    assert set(changed(before, after)) >= {LINK, "latency of a hop between nodes"}
    for row in rows().values():
        if row.name in set(changed(before, after)):
            rises = value(after, row.paths[0]) > value(before, row.paths[0])
            assert rises is (row.worse == "high")


def test_half_way_to_the_worse_end_is_the_middle() -> None:
    before = profiles_of("dgx-h100")
    after, worst = pessimistic_profiles(before, 0.5), pessimistic_profiles(before)
    assert set(changed(before, worst)) >= set(changed(before, after)) >= {LINK}
    (path, *_), link = rows()[LINK].paths, rows()[LINK]
    assert value(after, path) == pytest.approx(value(before, path) * sum(link.ends) / 2)


def test_a_figure_of_the_user_is_not_drawn() -> None:
    device, cluster, runtime = profiles_of("dgx-h100")
    link = Quantity(value=6e10, source="measured by us", kind=Kind.GIVEN)
    mine = (replace(device, device_to_host_bytes_per_s=link), cluster, runtime)
    assert LINK not in set(changed(mine, pessimistic_profiles(mine)))


def test_draws_are_the_same_each_time() -> None:
    assert drawn_profiles(profiles_of("dgx-a100")) == drawn_profiles(profiles_of("dgx-a100"))


@pytest.mark.parametrize("ends", [(1.0, 1.0), (2.0, 1.0), (-1.0, 1.0)])
def test_ends_must_rise(ends: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="ends must rise"):
        replace(rows()[LINK], ends=ends)
