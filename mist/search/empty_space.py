"""Why a space of layouts is empty."""

from mist.pareto.strategies import refusals
from mist.plans.search_space import SearchSpace
from mist.plans.workload import batches_near
from mist.symbolic.job import Job


def no_group_words(job: Job, space: SearchSpace) -> str:
    """Why the space is empty: the rules that a restriction breaks, or the global batch."""
    for tp in space.tp or ():
        messages = [
            rule.message.format(tp=tp)
            for rule in job.rules
            if rule.name.startswith("tp-") and not rule.mask({"tp": tp}).all()
        ]
        if messages:
            return " ".join(messages)
    if reasons := refusals(job, space):
        return f"Nothing can run{_restricted_words(space)}: {' '.join(reasons)}"
    if 1 not in space.chunks:
        return (
            f"Nothing can run{_restricted_words(space)}: chunks take schedule interleaved, 2 or "
            "more stages, layers that are all alike, and a layer for each chunk of each stage."
        )
    batch, num_gpus = job.workload.global_batch, job.platform.num_gpus
    if batch % num_gpus:
        advice = f"Try --global-batch {batches_near(batch, num_gpus)[-1]}."
    else:
        advice = "Restrict less, or let the restricted sizes divide it."
    return (
        f"--global-batch {batch}: no (dp, micro-batch, micro-batches) factorises it on {num_gpus} "
        f"GPUs{_restricted_words(space)}. {advice}"
    )


def _restricted_words(space: SearchSpace) -> str:
    return f" with {', '.join(space.restrictions)}" if space.restrictions else ""
