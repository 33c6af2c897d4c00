"""Looks up every field of exported Megatron-Bridge modules in the sources, which need CUDA to run.

bridge_check.py FILES SOURCE...: folders of unpacked wheels. A field must be declared by the class
of its section, or by one that this inherits from; nothing is imported.
"""

import ast
import re
import sys
from pathlib import Path

files, *sources = map(Path, sys.argv[1:])
declared: dict[str, set[str]] = {}
bases: dict[str, list[str]] = {}
for path in (p for folder in sources for p in folder.rglob("*.py")):
    for node in ast.walk(ast.parse(path.read_text(errors="replace"))):
        if isinstance(node, ast.ClassDef):
            own = {s.target.id for s in node.body if isinstance(s, ast.AnnAssign)}
            declared.setdefault(node.name, set()).update(own)
            bases.setdefault(node.name, []).extend(
                word for base in node.bases for word in re.findall(r"\w+", ast.unparse(base))
            )
PREFIXES = ("MCore", "MTrain", "MLM")  # by which Bridge imports classes of megatron-core


def fields(name: str, seen: frozenset[str] = frozenset()) -> set[str]:
    """Those of a class and of its bases."""
    if name in seen:
        return set()
    plain = next((name.removeprefix(p) for p in PREFIXES if name.startswith(p)), name)
    found = declared.get(name, set()) | declared.get(plain, set())
    for base in [*bases.get(name, []), *([plain] if plain != name else [])]:
        found |= fields(base, seen | {name})
    return found


SECTIONS = {
    "model": "GPTModelProvider",
    "train": "TrainingConfig",
    "ddp": "DistributedDataParallelConfig",
    "optimizer": "OptimizerConfig",
    "checkpoint": "CheckpointConfig",
    "dataset": "GPTDatasetConfig",
}
known = {section: fields(name) for section, name in SECTIONS.items()}
modules = sorted(files.glob("megatron-bridge/*/bridge_plan.py"))
for module in modules:
    for section, field in re.findall(r"cfg\.(\w+)\.(\w+) =", module.read_text()):
        assert field in known[section], (module, section, field)
print(f"megatron-bridge: {len(modules)} files, every field is declared")
assert len(modules) >= 12
