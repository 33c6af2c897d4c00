"""What a rank program knows of the tests' models: found once for each, as names and numbers.

It depends on the model and on tp, not on the rest of a layout: a program that runs many layouts of
a model looks at it once; forked ranks, of which there are many, share what the first one found.
"""

import fcntl
import os
import pickle
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from mist.exec.build.empty_weights import load
from mist.exec.build.model_structure import examine
from mist.exec.build.parallel import Subject
from mist.exec.build.tensor_rules import tensor_rules
from mist.plans.plan import Plan
from mist.plans.workload import Attention
from mist.trace.models.loader import LoadedModel
from tests.exec.double import wide

SHARED = "MIST_TESTS_SUBJECTS"  # the folder of what is shared, if anything is


def known_subject(plan: Plan) -> Subject:
    """The model that a plan names, and what `subject_of` finds of it.

    In float64 within `in_double()`. A layout is built from a copy of it: nobody changes it.
    """
    loaded = _loaded(plan.model.source, torch.get_default_dtype())
    source, seq_len = Path(plan.model.source), plan.workload.seq_len
    content = sha256((source / "config.json" if source.is_dir() else source).read_bytes())
    name = f"{content.hexdigest()}-{seq_len}"
    structure = _known(name, lambda: examine(loaded, seq_len))
    rules = {
        tp: _known(f"{name}-{tp}", lambda tp=tp: tensor_rules(loaded, structure, seq_len, tp))
        for tp in sorted({stage.tp for stage in plan.stages} - {1})
    }
    return Subject(loaded=loaded, structure=structure, rules=rules)


@cache
def _loaded(source: str, dtype: torch.dtype) -> LoadedModel:
    return wide(load(source, Attention.FLASH))


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
