"""The options of a run, apart from its plan. Torch-free; crosses to the ranks as JSON."""

import json
from dataclasses import asdict, dataclass

from mist.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """One run of `mist apply`. Paths are text. `timeout_s`: of one collective.

    `model`: where the model is, if not where the plan says. `weights`: a folder to read them from;
    None: from the folder of the model's config.json where it has some, else drawn from the seed.

    Raises InputError for options that do not belong together.
    """

    plan: str
    model: str | None = None
    steps: int = 10
    seed: int = 7
    lr: float = 3e-4
    max_norm: float = 1.0
    data: str | None = None
    log: str | None = None
    checkpoint: str | None = None
    every: int = 0
    resume: bool = False
    weights: str | None = None
    from_scratch: bool = False
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.every < 0:
            raise InputError(f"--steps {self.steps} --every {self.every}: give positive numbers.")
        if (self.every or self.resume) and self.checkpoint is None:
            raise InputError("--every and --resume need --checkpoint DIR.")
        if self.weights is not None and self.from_scratch:
            raise InputError("--weights and --from-scratch exclude each other: give one.")
        for name in ("lr", "max_norm", "timeout_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} {getattr(self, name)} is not a positive number.")

    def dump(self) -> str:
        """As one argument of a command."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> "RunOptions":
        """What `dump` gave."""
        return cls(**json.loads(text))
