"""Which groups a search visits, and in which order: `mist.pareto.strategies` with their bounds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mist.pareto.bounds import lower_bound_s
from mist.pareto.strategies import Group, groups
from mist.plans.plan import Limits
from mist.plans.search_space import SearchSpace
from mist.symbolic.job import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """A group to search within limits, and seconds that no plan of it undercuts."""

    bound_s: float
    group: Group
    limits: Limits

    @property
    def order(self) -> tuple[float, ...]:
        """Most promising first, stages of several sizes last."""
        group = self.group
        return (len(group.sizes), self.bound_s, group.num_stages, group.num_micro_batches)


def listed_groups(  # noqa: PLR0913 - what is listed, and how far
    job: Job,
    space: SearchSpace,
    limits: Limits,
    is_over: Callable[[], bool],
    listed: Sequence[Visit],
    *,
    is_worth: Callable[[Group], bool] = lambda group: True,
) -> tuple[list[Visit], bool]:
    """The groups that are worth it with their bounds, and whether these are all of them.

    A batch may have thousands. Those that are `listed` already, if any are.
    """
    found, is_whole = [replace(visit, limits=limits) for visit in listed], True
    if found:
        return found, is_whole
    for group in filter(is_worth, groups(job, space)):
        found.append(
            Visit(bound_s=lower_bound_s(job, group, space.levels), group=group, limits=limits)
        )
        if is_over():
            is_whole = False
            break
    return found, is_whole


def in_order(visits: Sequence[Visit]) -> list[Visit]:
    """Those visits, in the order of the search."""
    return sorted(visits, key=lambda visit: visit.order)
