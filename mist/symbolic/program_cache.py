"""Programs kept between runs, as JSON beside the traces: with one, no sympy is needed.

An entry is found by a digest of the trace it was printed from, the runtime's profile, the precision
and the source of this room and of what it reads. An entry that cannot be read is as good as none.
"""

from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from mist.errors import OutputError
from mist.files import digest, write_text
from mist.plans.workload import Precision
from mist.symbolic.program import ModelPrograms

_READ_HERE: Final = (
    "model/graph.py",
    "model/summary.py",
    "plans/plan.py",
    "plans/workload.py",
    "platform/runtime.py",
)


def programs_key(trace: str, runtime: str, precision: Precision) -> str:
    """The digest of everything that programs depend on.

    Args:
        trace: digest of the trace.
        runtime: digest of the runtime's profile.
        precision: compute precision.
    """
    here = Path(__file__).parent
    ours = (*sorted(here.glob("*.py")), *(here.parent / name for name in _READ_HERE))
    sources = (path.read_text(encoding="utf-8") for path in ours)
    return digest(trace, runtime, precision, version("sympy"), *sources)


def load_programs(folder: Path, key: str) -> ModelPrograms | None:
    """The programs of that key, or None."""
    try:
        return _adapter().validate_json((folder / f"{key}.json").read_bytes())
    except (OSError, ValidationError):
        return None


def store_programs(folder: Path, key: str, programs: ModelPrograms) -> None:
    """Keep programs; a folder that cannot be written is no fault."""
    with suppress(OSError, OutputError):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{key}.json", _adapter().dump_json(programs).decode())


def _adapter() -> TypeAdapter[ModelPrograms]:
    return TypeAdapter(ModelPrograms)
