"""Which groups a search visits, and in which order: `mist.pareto.strategies` with their bounds."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from mist.pareto.bounds import lower_bound_s
from mist.pareto.strategies import Group, groups
from mist.plans.plan import Limits
from mist.plans.search_space import SearchSpace
from mist.symbolic.job import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """A group to search within limits, and seconds that no plan of it undercuts.

    `fits_from_s`: within the limits no plan of it is faster either, as a search learned.
    """

    bound_s: float
    group: Group
    limits: Limits
    fits_from_s: float = 0.0

    @property
    def least_s(self) -> float:
        """Seconds that no plan of it within the limits undercuts."""
        return max(self.bound_s, self.fits_from_s)

    @property
    def order(self) -> tuple[float, ...]:
        """Most promising first, stages of several sizes last."""
        group = self.group
        return (len(group.sizes), self.bound_s, group.num_stages, group.num_micro_batches)


def listed_groups(
    job: Job,
    space: SearchSpace,
    limits: Limits,
    is_over: Callable[[], bool],
    listed: Sequence[Visit],
) -> tuple[list[Visit], bool]:
    """The groups of a space with their bounds, and whether these are all of them.

    A batch may have thousands. Those that are `listed` already, if any are.
    """
    found, is_whole = [replace(visit, limits=limits) for visit in listed], True
    if found:
        return found, is_whole
    for group in groups(job, space):
        found.append(
            Visit(bound_s=lower_bound_s(job, group, space.levels), group=group, limits=limits)
        )
        if is_over():
            is_whole = False
            break
    return found, is_whole


def priced_anew(job: Job, space: SearchSpace, visits: Iterable[Visit]) -> Iterator[Visit]:
    """Visits of groups that were listed with other figures of the platform, as `job` prices them.

    Which strategies a group has does not depend on figures: only rules keep some out.
    """
    for visit in visits:
        group = visit.group
        strategies = group.strategies.priced(job, group.num_stages, group.schedule)
        group = replace(group, strategies=strategies)
        bound_s = lower_bound_s(job, group, space.levels)
        yield replace(visit, group=group, bound_s=bound_s, fits_from_s=0.0)


def in_order(visits: Sequence[Visit]) -> list[Visit]:
    """Those visits, in the order of the search."""
    return sorted(visits, key=lambda visit: visit.order)
