"""Shipped platforms as tests use them."""

from functools import cache
from pathlib import Path

from mist.plans.numerics import NUMERICS
from mist.plans.workload import Precision
from mist.platform import OpCosts
from tests.toys import toy_platform

ROOT = Path(__file__).parents[2]
PROFILES = ROOT / "profiles"
# Tables that the figures were fitted to; they lie beside some checkouts, not in the repository.
PUBLISHED = ROOT.parent / "shared" / "data"

DEVICES = sorted(path.stem for path in (PROFILES / "devices").glob("*.yaml"))
RUNTIMES = sorted(path.stem for path in (PROFILES / "runtimes").glob("*.yaml"))
CLUSTERS = sorted(path.stem for path in (PROFILES / "clusters").glob("*.yaml"))


def other_one(family: str) -> str:
    """What a refusal of an unknown name says of profiles that do not ship."""
    return (
        f"For another one, change figures of the nearest (--set {family}.FIGURE=VALUE; mist "
        "profiles show NAME lists them), or add a profile (docs/extending.md)."
    )


@cache
def costs(gpu: str, precision: Precision = Precision.BF16) -> OpCosts:
    """Costs of eight of these on their default cluster, by the laws: no whole runs are fitted."""
    platform = toy_platform(gpu=gpu)
    return OpCosts(
        device=platform.device,
        cluster=platform.cluster,
        runtime=platform.runtime,
        numerics=NUMERICS[precision],
    )
