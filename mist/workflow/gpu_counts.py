"""`--gpus`: a number, a list, or a range of which a dozen numbers are tried.

Of a range A..B: the powers of two, and the multiples of a node, that the cluster can form. Where
they are more than MOST_COUNTS, only multiples of 2, 4, 8, ... nodes beside the powers of two.
"""

from dataclasses import dataclass
from typing import Final

from mist.errors import InputError
from mist.plans.workload import MOST_GPUS
from mist.platform import Cluster
from mist.units import parse_whole

MOST_COUNTS: Final = 12
EXPECTED: Final = "expected a number (16), a list (8,16,24) or a range (8..64)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Numbers of GPUs that the user asks about: those of a list, or `first` to `last`."""

    text: str
    listed: tuple[int, ...]
    first: int = 0
    last: int = 0

    def of(self, cluster: Cluster) -> tuple[int, ...]:
        """The numbers to try on a cluster, rising. Raises InputError for a range of none."""
        return self.listed or _in_range(self, cluster)


def counts_of(text: str) -> Counts:
    """What `--gpus` says. Raises InputError when it cannot be read."""
    try:
        return _counts(text)
    except ValueError:
        raise InputError(f"--gpus {text}: {EXPECTED}.") from None


def _counts(text: str) -> Counts:
    """The same. Raises ValueError for what is no number."""
    first_word, dots, last_word = text.partition("..")
    if dots:
        first, last = parse_whole(first_word), parse_whole(last_word)
        if first < 1:
            raise InputError(f"--gpus {text}: a plan needs at least one GPU. Try --gpus 1..{last}.")
        if first > last:
            raise InputError(
                f"--gpus {text}: {first} is more than {last}. Try --gpus {last}..{first}."
            )
        if last > MOST_GPUS:
            raise InputError(
                f"--gpus {text}: {last} is more than Mist plans for. Try --gpus "
                f"{min(first, MOST_GPUS)}..{MOST_GPUS}."
            )
        return Counts(text=text, listed=(), first=first, last=last)
    return Counts(text=text, listed=tuple(sorted(set(map(parse_whole, text.split(","))))))


def _in_range(counts: Counts, cluster: Cluster) -> tuple[int, ...]:
    per_node, nodes = cluster.num_gpus_per_node, cluster.num_nodes_limit
    last = counts.last if nodes is None else min(counts.last, nodes * per_node)
    powers = {1 << bit for bit in range(last.bit_length())}
    able = {n for n in powers if counts.first <= n <= last and (n <= per_node or n % per_node == 0)}
    step = per_node
    # Of a range of a million no list is made: multiples are counted first.
    while last // step - (counts.first - 1) // step > MOST_COUNTS:
        step *= 2
    while True:
        start = -(-counts.first // step) * step
        found = able | set(range(start, last + 1, step))
        if len(found) <= MOST_COUNTS or step > last:
            break
        step *= 2
    if not found:
        raise InputError(
            f"--gpus {counts.text}: {cluster.name} (GPUs per node: {per_node}) has no power of two "
            f"and no multiple of a node in that range. Try --gpus {counts.first},{counts.last}."
        )
    return tuple(sorted(found))
