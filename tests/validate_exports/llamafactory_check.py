"""Every key of exported LLaMA-Factory files is an argument that its parser knows.

llamafactory_check.py FILES SOURCE: the folder of its unpacked wheel. Its parser takes the fields of
the classes in hparams and those of TrainingArguments, and refuses all others; to import it takes
more packages than this asks for, so that its classes are read and not imported.
"""

import ast
import sys
from dataclasses import fields
from pathlib import Path

import yaml
from transformers import TrainingArguments

files, source = map(Path, sys.argv[1:])
known = {field.name for field in fields(TrainingArguments)}
for path in (source / "llamafactory" / "hparams").glob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            known.add(node.target.id)
found = sorted(files.glob("llamafactory/*/llamafactory.yaml"))
for path in found:
    data = yaml.safe_load(path.read_text())
    assert set(data) <= known, (path, set(data) - known)
    assert (path.parent / data["deepspeed"]).is_file()
print(f"llamafactory: {len(found)} files, every key known")
assert len(found) >= 12
