"""Kubeflow's models read every TrainJob; the keys of every task are those of SkyPilot's schema.

jobs_check.py FILES SKYPILOT: the folder of its unpacked wheel, which is read and not imported.
"""

import ast
import sys
from pathlib import Path

import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

files, source = map(Path, sys.argv[1:])
jobs = sorted(files.glob("kubernetes/*/trainjob.yaml"))
for path in jobs:
    data = yaml.safe_load(path.read_text())
    job = TrainerV1alpha1TrainJob.from_dict(data)
    # It passes over keys that it does not know: what it writes again must be the same.
    assert job is not None
    assert job.to_dict() == data, path

tree = ast.parse((source / "sky" / "utils" / "schemas.py").read_text())
(schema,) = [n for n in tree.body if getattr(n, "name", "") == "get_task_schema"]
known = {n.value for n in ast.walk(schema) if isinstance(n, ast.Constant)}
tasks = sorted(files.glob("skypilot/*/task.yaml"))
for path in tasks:
    data = yaml.safe_load(path.read_text())
    assert set(data) <= known, (path, set(data) - known)
    assert data["num_nodes"] > 0
print(f"kubernetes: {len(jobs)} TrainJobs accepted; skypilot: {len(tasks)} tasks, every key known")
assert len(jobs) >= 12
assert len(tasks) >= 12
