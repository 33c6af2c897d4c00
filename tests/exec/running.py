"""A variant on one rank of the tests' rank programs, with the data of its model."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from mist.exec.build.batches import Batches
from mist.exec.build.parallel import build
from tests.exec.layouts import Variant, plan_of
from tests.exec.parity import SEED, settings
from tests.exec.subjects import known_subject
from tests.exec.variants import SLOW, VARIANTS

Precision = Callable[[], AbstractContextManager[None]]


class Run:
    """Built with weights of the seed; `batches`: of its model. `precision`: all of it is within."""

    def __init__(
        self,
        variant: Variant,
        folder: Path,
        device: torch.device,
        max_norm: float | None,
        precision: Precision = nullcontext,
    ) -> None:
        plan = plan_of(variant, folder)
        self._precision = precision
        with precision():
            subject = known_subject(plan)
            self.parallel = build(subject, plan, device, settings(max_norm), SEED)
            self.batches = Batches(subject.loaded, plan.workload, SEED)

    def train(self, first: int, last: int) -> list[float]:
        steps = range(first, last)
        with self._precision():
            return [self.parallel.train_step(self.batches.step(i)).loss for i in steps]


def variant_of(name: str) -> Variant:
    return next(variant for variant in (*VARIANTS, *SLOW) if variant.name == name)
