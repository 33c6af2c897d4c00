"""Settings of 15 public configurations of each kind: what is read, what is listed, what is refused.

`public_files/TARGET.yaml` has them, typed anew from the sources that it names. Every setting of a
file must be read, be listed as not modelled, or be of no account; none may be passed over.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mist.errors import InputError
from mist.export.target import Configuration
from mist.export.targets import TARGETS
from mist.plans.plan import Offload
from mist.workflow.foreign_files import ForeignFile, foreign_file

FOLDER = Path(__file__).parent / "public_files"
READ = [target.name for target in TARGETS if target.read is not None]
# Beside the files of LLaMA-Factory.
NAMED = {
    "zero3.json": '{"zero_optimization": {"stage": 3}}',
    "tp.json": '{"zero_optimization": {"stage": 2}, "tensor_parallel": {"autotp_size": 2}}',
}
NUM_FILES = 15
ROWS = [
    (name, row)
    for name in READ
    for row in yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("name", READ)
def test_there_are_enough_of_each_kind(name: str) -> None:
    files = [row["name"] for target, row in ROWS if target == name]
    assert len(set(files)) == NUM_FILES


def read(row: dict[str, Any], folder: Path) -> ForeignFile | None:
    """The file, with its mappings in lines of their own, as people have them."""
    text = row["text"]
    if text.startswith("{") and not row["name"].endswith(".json"):
        text = yaml.safe_dump(yaml.safe_load(text), sort_keys=False)
    (folder / row["name"]).write_text(text)
    for name, named in NAMED.items():
        (folder / name).write_text(named)
    return foreign_file(str(folder / row["name"]))


def said(configuration: Configuration, name: str) -> object:
    """A value of a configuration, be it a knob, a share that is offloaded or a field."""
    for place in (configuration.knobs, vars_of(configuration.offload), vars_of(configuration)):
        if name in place:
            return place[name]
    return None


def vars_of(record: Offload | Configuration) -> dict[str, Any]:
    """Fields of a record with slots."""
    return {name: getattr(record, name) for name in record.__slots__}


@pytest.mark.parametrize(("target", "row"), ROWS, ids=[f"{t}-{row['name']}" for t, row in ROWS])
def test_a_public_file(target: str, row: dict[str, Any], tmp_path: Path) -> None:
    if refused := row.get("refused"):
        with pytest.raises(InputError) as refusal:
            read(row, tmp_path)
        assert refused in str(refusal.value)
        return
    file = read(row, tmp_path)
    assert file is not None
    assert file.target.name == target
    found = {name: said(file.configuration, name) for name in row["said"]}
    assert found == row["said"]
    names = [setting.replace(" =", "").split()[0] for setting in file.configuration.unmodelled]
    assert sorted(names) == sorted(row["unmodelled"])
