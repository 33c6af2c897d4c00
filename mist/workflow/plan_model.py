"""Which model a plan file is judged and run with, and whether its Python may run.

A plan is a file that somebody wrote, and it names the model. A configuration or a preset is data; a
Python file runs, with the rights of the user. So it runs where it lies under the current folder,
where the user named it on the command line, or where the user trusts the plan. The fingerprint in a
plan proves nothing: whoever writes the plan writes it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mist.errors import InputError
from mist.plans.plan import Plan
from mist.symbolic.load_programs import Progress, quiet
from mist.workflow.request import OBJECT


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelAccess:
    """What the user says of the model of a plan: which one it is, or that any may run."""

    model: str | None = None
    trust: bool = False


UNDER_HERE: Final = ModelAccess()
TRUSTED: Final = ModelAccess(trust=True)


def model_of(
    plan: Plan, path: Path, access: ModelAccess = UNDER_HERE, progress: Progress = quiet
) -> str:
    """The model of a plan file; it is looked for here and in the folder of the plan.

    Raises InputError for a Python file that the user has not let run.
    """
    if access.model is not None:
        return access.model
    source = plan.model.source
    if source.startswith(OBJECT):
        raise InputError(
            f"{path} was planned from a module in Python, which no file names. "
            "Set model.source to a file with build_model()."
        )
    beside = path.parent / source
    if beside.exists() and not Path(source).exists():
        source = str(beside)
    file = Path(source).expanduser()
    if file.suffix == ".py" and file.is_file():
        # Links are followed: a folder that was unpacked may hold one that leads out of it.
        under_here = file.resolve().is_relative_to(Path.cwd().resolve())
        if not (access.trust or under_here):
            raise InputError(
                f"{path} names the model {file.resolve()}, a Python file outside the current "
                "folder, which would run. Give the model itself behind the plan, or --trust where "
                "you trust who wrote the plan."
            )
        progress(f"{path} names the model {source}, a Python file that runs here")
    return source
