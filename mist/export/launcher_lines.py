"""Shell and batch scripts that start one process per GPU: lines that all targets share.

A value that comes from a plan or a path is quoted for the shell wherever it stands.
"""

import shlex
from collections.abc import Sequence

from mist.export.target import MARK, ExportSource, Written
from mist.plans.plan import ClusterRef

PORT = 29500


def nodes_of(cluster: ClusterRef) -> int:
    """Machines of the cluster."""
    return -(-cluster.num_gpus // cluster.gpus_per_node)


def head(subject: ExportSource, what: str) -> list[str]:
    """The first lines of a file with # comments."""
    # A name with a line break would end the comment.
    path = subject.path.encode("unicode_escape").decode()
    return [f"# {what}", f"# Written by `{MARK}` from {path}; each comment names the plan field."]


def torchrun_lines(cluster: ClusterRef, *, env: Sequence[str] = ()) -> list[str]:
    """A shell script up to the command: torchrun with as many processes as a node has GPUs."""
    return [
        "set -euo pipefail",
        *env,
        'exec torchrun --nnodes="${NNODES:-' + str(nodes_of(cluster)) + '}" \\',
        f"    --nproc-per-node={min(cluster.gpus_per_node, cluster.num_gpus)} \\",
        f'    --rdzv-backend=c10d --rdzv-endpoint="${{HEAD:-localhost}}:{PORT}" \\',
        '    --rdzv-id="${JOB:-mist}" \\',
    ]


def launch_script(
    subject: ExportSource, what: str, command: Sequence[str], *, env: Sequence[str] = ()
) -> str:
    """A script that runs `command` (its last words, already quoted) on every GPU of the plan."""
    lines = torchrun_lines(subject.plan.cluster, env=env)
    return node_script(subject, what, [*lines, f"    {' '.join(command)}"])


def node_script(subject: ExportSource, what: str, lines: Sequence[str]) -> str:
    """A shell script that is run on each node, whatever its lines start there."""
    cluster = subject.plan.cluster
    above = [
        "#!/usr/bin/env bash",
        *head(subject, what),
        f"# cluster: {cluster.num_gpus} GPUs, {cluster.gpus_per_node} per node",
        "# Run it on each node; HEAD is the name of the first one.",
    ]
    return "\n".join([*above, *lines]) + "\n"


def applied(subject: ExportSource) -> list[str]:
    """The words that train a plan by `mist apply`."""
    return ["--no-python", "--", "mist", "apply", shlex.quote(subject.path), '"$@"']


def write_torchrun(subject: ExportSource) -> Written:
    """A script for every node that trains the plan with `mist apply`."""
    script = launch_script(subject, "Trains a plan with mist apply.", applied(subject))
    return Written(files={"launch.sh": script})


def write_slurm(subject: ExportSource) -> Written:
    """A batch script that does so on the nodes that Slurm gives."""
    cluster = subject.plan.cluster
    per_node = min(cluster.gpus_per_node, cluster.num_gpus)
    lines = [
        "#!/usr/bin/env bash",
        f"#SBATCH --job-name={MARK.replace(' ', '-')}",
        f"#SBATCH --nodes={nodes_of(cluster)}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --gpus-per-node={per_node}",
        *head(subject, "Trains a plan with mist apply under Slurm."),
        f"# --nodes, --gpus-per-node: cluster.num_gpus {cluster.num_gpus}, cluster.gpus_per_node",
        "set -euo pipefail",
        'HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        'exec srun torchrun --nnodes="$SLURM_NNODES" \\',
        f"    --nproc-per-node={per_node} \\",
        f'    --rdzv-backend=c10d --rdzv-endpoint="$HEAD:{PORT}" --rdzv-id="$SLURM_JOB_ID" \\',
        f"    {' '.join(applied(subject))}",
    ]
    return Written(files={"job.sbatch": "\n".join(lines) + "\n"})
