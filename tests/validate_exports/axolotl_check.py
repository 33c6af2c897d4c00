"""Runs with axolotl's sources: its own pydantic models read every exported YAML file.

The whole model asks for a GPU and for datasets, so that the parts of it are asked by themselves;
unknown keys, which axolotl passes over, are refused here.
"""

import ast
import sys
from pathlib import Path

import yaml

files, source = map(Path, sys.argv[1:])
schemas = source / "axolotl" / "utils" / "schemas"
names = {
    node.target.id
    for path in schemas.glob("*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
}
scope: dict[str, object] = {"__name__": "fsdp"}
exec(compile((schemas / "fsdp.py").read_text(), "fsdp.py", "exec"), scope)
modules = sorted(files.glob("axolotl/*/axolotl.yaml"))
for module in modules:
    data = yaml.safe_load(module.read_text())
    assert set(data) <= names, (module, set(data) - names)
    model = scope["FSDPConfig"]
    parts = data.get("fsdp_config", {})
    found = model.model_validate(parts)  # type: ignore[attr-defined]
    assert set(parts) <= set(model.model_fields)  # type: ignore[attr-defined]
    assert all(getattr(found, key) == value for key, value in parts.items())
print(f"axolotl: {len(modules)} files accepted")
assert len(modules) >= 12
