"""What a rank program knows of the tests' models: found once for each, as names and numbers.

It depends on the model and on tp, not on the rest of a layout: a program that runs many layouts of
a model looks at it once; forked ranks, of which there are many, share what the first one found.
"""

import fcntl
import os
import pickle
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from mist.exec.build.model_structure import examine
from mist.exec.build.parallel import Subject
from mist.exec.build.tensor_rules import tensor_rules
from mist.plans.plan import Plan
from mist.trace.models.loader import LoadedModel

SHARED = "MIST_TESTS_SUBJECTS"  # the folder of what is shared, if anything is


def known_subject(loaded: LoadedModel, plan: Plan) -> Subject:
    """As `subject_of` gives it. `loaded`: the model that the plan names, as it was loaded."""
    source, seq_len = Path(plan.model.source), plan.workload.seq_len
    content = sha256((source / "config.json" if source.is_dir() else source).read_bytes())
    name = f"{content.hexdigest()}-{seq_len}"
    structure = _known(name, lambda: examine(loaded, seq_len))
    rules = {
        tp: _known(f"{name}-{tp}", lambda tp=tp: tensor_rules(loaded, structure, seq_len, tp))
        for tp in sorted({stage.tp for stage in plan.stages} - {1})
    }
    return Subject(loaded=loaded, structure=structure, rules=rules)


_FOUND: dict[str, Any] = {}


def _known(name: str, find: Callable[[], Any]) -> Any:  # noqa: ANN401
    if name not in _FOUND:
        folder = os.environ.get(SHARED)
        _FOUND[name] = _shared(Path(folder) / name, find) if folder else find()
    return _FOUND[name]


def _shared(path: Path, find: Callable[[], Any]) -> Any:  # noqa: ANN401
    """What is in a file, else what is found and put there; others wait for who looks first."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            path.write_bytes(pickle.dumps(find()))
        return pickle.loads(path.read_bytes())
