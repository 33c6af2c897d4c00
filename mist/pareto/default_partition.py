"""How a runtime deals the layers of a model out to the parts of a pipeline when nobody says.

A part is a stage, or one of the chunks of a stage: part p is chunk p // S of stage p % S.
"""

from mist.plans.plan import even_layers, layers_by_cost
from mist.symbolic.columns import strategy_columns
from mist.symbolic.job import Job


def dealt_layers(job: Job, num_parts: int) -> tuple[int, ...] | None:
    """Layers of each part, in the order of the layers; None where the runtime cannot deal them."""
    rule, num_layers = job.platform.runtime.knobs.layer_split, job.num_layers
    if num_parts > num_layers or (rule == "equal" and num_layers % num_parts):
        return None
    if rule != "by_cost" or num_parts == 1:
        return even_layers(num_layers, num_parts)
    layer, head = _parameters(job)
    counts = layers_by_cost(num_layers, num_parts, layer_cost=layer, ends=(0.0, head))
    return counts if all(counts) else None


def dealing_words(job: Job, num_stages: int, chunks: int) -> str:
    """That the runtime cannot deal the layers out to these stages."""
    parts = f"{num_stages} stages" + (f" of {chunks} chunks" if chunks > 1 else "")
    return (
        f"runtime {job.platform.runtime.name} does not deal {job.num_layers} layers out to {parts} "
        "by itself"
    )


def _parameters(job: Job) -> tuple[float, float]:
    """Parameters of a layer of the first kind and of the head."""
    whole = strategy_columns(job.placement, {}, num_stages=1)
    terms = job.cost.terms(whole)
    return float(terms["term_0_params"]), float(terms["term_head_params"])
