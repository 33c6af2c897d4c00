"""Jobs that train a plan with `mist apply` under Kubernetes or SkyPilot."""

from typing import Any, Final

import yaml

from mist.export.launcher_lines import PORT, applied, head, nodes_of
from mist.export.target import MARK, ExportSource, Written, added

NAME: Final = MARK.replace(" ", "-")
IMAGE: Final = "your/image:with-mist"


def write_kubernetes(subject: ExportSource) -> Written:
    """A TrainJob of Kubeflow Trainer (v1alpha1) under its torch runtime."""
    cluster = subject.plan.cluster
    per_node = min(cluster.gpus_per_node, cluster.num_gpus)
    # The runtime sets PET_NNODES and the like, which torchrun reads.
    command = ["torchrun", "--no-python", "--", "mist", "apply", subject.path]
    job = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": NAME},
        "spec": {
            "runtimeRef": {"name": "torch-distributed"},
            "trainer": {
                "image": IMAGE,
                "numNodes": nodes_of(cluster),
                "numProcPerNode": per_node,
                "resourcesPerNode": {"limits": {"nvidia.com/gpu": str(per_node)}},
                "command": command,
            },
        },
    }
    words = f"{IMAGE} stands for an image that has Mist, the plan and its model"
    return Written(
        files={"trainjob.yaml": _text(subject, "A TrainJob of Kubeflow Trainer.", job)},
        added=[added("model", words)],
    )


def write_skypilot(subject: ExportSource) -> Written:
    """A task of SkyPilot (sky launch FILE) with the current folder as its working folder."""
    cluster = subject.plan.cluster
    per_node = min(cluster.gpus_per_node, cluster.num_gpus)
    run = [
        "set -euo pipefail",
        'HEAD=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)',
        'exec torchrun --nnodes="$SKYPILOT_NUM_NODES" --node-rank="$SKYPILOT_NODE_RANK" \\',
        '  --nproc-per-node="$SKYPILOT_NUM_GPUS_PER_NODE" \\',
        f'  --rdzv-backend=c10d --rdzv-endpoint="$HEAD:{PORT}" --rdzv-id="$SKYPILOT_TASK_ID" \\',
        f"  {' '.join(applied(subject))}",
    ]
    task = {
        "name": NAME,
        "workdir": ".",
        "num_nodes": nodes_of(cluster),
        "resources": {"accelerators": f"{accelerator(cluster.device)}:{per_node}"},
        "run": "\n".join(run) + "\n",
    }
    words = "the task copies the current folder: the plan and its model must lie in it"
    return Written(
        files={"task.yaml": _text(subject, "A task of SkyPilot.", task)},
        added=[added("model", words)],
    )


def accelerator(device: str) -> str:
    """A device by SkyPilot's name: "h100-sxm" as "H100", "a100-sxm-80" as "A100-80GB"."""
    kind, *others = device.split("-")
    return f"{kind.upper()}-80GB" if kind == "a100" and "80" in others else kind.upper()


def _text(subject: ExportSource, what: str, document: dict[str, Any]) -> str:
    cluster = subject.plan.cluster
    lines = [
        *head(subject, what),
        f"# nodes and GPUs: cluster.num_gpus {cluster.num_gpus}, "
        f"cluster.gpus_per_node {cluster.gpus_per_node}",
    ]
    return "\n".join(lines) + "\n" + yaml.safe_dump(document, sort_keys=False, width=1000)
