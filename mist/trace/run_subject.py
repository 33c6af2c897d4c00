"""What is run to record a model: the model with what is known of it so far."""

from collections.abc import Sequence
from dataclasses import dataclass

from mist.errors import TraceError
from mist.model.graph import B, S
from mist.trace.diagnose import traced
from mist.trace.models.loader import LoadedModel
from mist.trace.models.source import TraceSetting
from mist.trace.recording.op_limit import OpLimit
from mist.trace.recording.recorded_run import Point, RecordedRun
from mist.trace.recording.session import Forms, Session
from mist.trace.recording.size_hints import BATCH_HINT, seq_hint
from mist.trace.repeated_blocks import Layers
from mist.trace.tensor_parallel.tp_sharding import Sharding


class OneLength(TraceError):
    """A model whose trace holds for the length that it was traced at only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSubject:
    """What is run: a model with what is known of it so far, its layers in other forms or none."""

    model: LoadedModel
    setting: TraceSetting
    layers: Layers | None = None
    sharding: Sharding | None = None
    limit: OpLimit | None = None
    forms: Sequence[Forms] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What tensor parallelism leaves whole."""
        return self.sharding.notes if self.sharding else ()

    @property
    def seq_hint(self) -> int:
        """The sequence length that decides branches."""
        return seq_hint(self.model, self.setting.seq_len)

    @property
    def hints(self) -> Point:
        """The concrete sizes that stand for all."""
        return Point(batch=BATCH_HINT, seq=self.seq_hint)

    def run(self, point: Point) -> RecordedRun:
        """One run. Raises TraceError, naming the line of the model at fault."""
        with traced(self.model.name):
            run = self.session(point)
        for size, value in run.fixed.items():
            # A trace for one length that was asked for is of use, one for one batch is not.
            if size == B or (size == S and self.setting.seq_len is None):
                name = "batch" if size == B else "sequence length"
                fault = OneLength if size == S else TraceError
                raise fault(
                    f"{self.model.name} works for one {name} only ({value}): an operation compares "
                    "it with a fixed size. Let make_batch and the model take any size."
                )
        return run

    def session(self, point: Point) -> RecordedRun:
        """One run. Raises whatever the model raises."""
        known = self.layers, self.setting, self.sharding
        return Session(self.model, *known, point, self.limit, self.forms).run()
