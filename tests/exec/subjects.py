"""What a rank program knows of the tests' models: found once for each, as names and numbers.

It depends on the model and on tp, not on the rest of a layout: programs that run many layouts of a
model look at it once.
"""

from mist.exec.build.model_structure import Anatomy, examine
from mist.exec.build.parallel import Subject
from mist.exec.build.tensor_rules import TensorRules, tensor_rules
from mist.plans.plan import Plan
from mist.trace.models.loader import LoadedModel

_ANATOMIES: dict[tuple[str, int], Anatomy] = {}
_RULES: dict[tuple[str, int, int], TensorRules] = {}


def known_subject(loaded: LoadedModel, plan: Plan) -> Subject:
    """As `subject_of` gives it. `loaded`: the model that the plan names, as it was loaded."""
    source, seq_len = plan.model.source, plan.workload.seq_len
    if (source, seq_len) not in _ANATOMIES:
        _ANATOMIES[source, seq_len] = examine(loaded, seq_len)
    anatomy = _ANATOMIES[source, seq_len]
    degrees = sorted({stage.tp for stage in plan.stages} - {1})
    for tp in degrees:
        if (source, seq_len, tp) not in _RULES:
            _RULES[source, seq_len, tp] = tensor_rules(loaded, anatomy, seq_len, tp)
    rules = {tp: _RULES[source, seq_len, tp] for tp in degrees}
    return Subject(loaded=loaded, anatomy=anatomy, rules=rules)
