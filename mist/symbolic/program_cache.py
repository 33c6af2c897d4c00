"""Programs kept between runs, as JSON beside the traces: with one, no sympy is needed.

An entry is found by a digest of the trace it was printed from, the runtime's profile, the precision
and the source of this room and of what it reads. An entry that cannot be read counts as missing.
Programs are kept as `program_codec` writes them, as data.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from mist.files import digest, parse_entry, read_entry, write_entry
from mist.model.summary import ModelFacts
from mist.plans.workload import Optimizer, Precision
from mist.symbolic.program import ModelPrograms
from mist.symbolic.program_codec import decode_program, encode_program
from mist.symbolic.program_trial import computes

PROGRAMS: Final = ("costs", "terms", "search_terms", "search", "stage", "flop", "domain")

_READ_HERE: Final = (
    "model/graph.py",
    "model/summary.py",
    "plans/memory_levels.py",
    "plans/numerics.py",
    "plans/plan.py",
    "plans/workload.py",
    "platform/runtime.py",
    "platform/states.py",
)


def programs_key(trace: str, runtime: str, precision: Precision, optimizer: Optimizer) -> str:
    """The digest of everything that programs depend on.

    Args:
        trace: digest of the trace.
        runtime: digest of the runtime's profile.
        precision: compute precision.
        optimizer: whose states live.
    """
    here = Path(__file__).parent
    ours = (*sorted(here.glob("*.py")), *(here.parent / name for name in _READ_HERE))
    sources = (path.read_text(encoding="utf-8") for path in ours)
    return digest(trace, runtime, precision, optimizer, version("sympy"), *sources)


def load_programs(folder: Path, key: str) -> ModelPrograms | None:
    """The programs of that key; None where there are none that compute."""
    text = read_entry(folder / f"{key}.json")
    try:
        entry: dict[str, Any] = parse_entry(text or "")
        facts = _facts().validate_python(entry["facts"])
        programs = ModelPrograms(
            facts=facts, **{name: decode_program(entry[name]) for name in PROGRAMS}
        )
    except (ValidationError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return programs if computes(programs) else None


def store_programs(folder: Path, key: str, programs: ModelPrograms) -> None:
    """Keep programs; a folder that cannot be written is no fault."""
    entry: dict[str, object] = {"facts": _facts().dump_python(programs.facts, mode="json")}
    entry |= {name: encode_program(getattr(programs, name)) for name in PROGRAMS}
    write_entry(folder / f"{key}.json", json.dumps(entry, separators=(",", ":")))


def _facts() -> TypeAdapter[ModelFacts]:
    return TypeAdapter(ModelFacts)
