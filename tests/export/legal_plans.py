"""Random legal plans of a toy model, judged as `mist check` judges a layout written by hand."""

from itertools import pairwise

from hypothesis import assume
from hypothesis import strategies as st

from mist.errors import InputError
from mist.plans.plan import Offload, Plan
from mist.plans.schedules import kind_of
from mist.plans.workload import Precision, ScheduleKind
from mist.workflow.checking import HandLayout, plan_by_hand
from mist.workflow.request import Question

NUM_LAYERS = 8
SEQ_LEN = 2048


@st.composite
def splits(draw: st.DrawFn, parts: int) -> tuple[int, ...]:
    """Eight layers in so many parts, none empty."""
    cuts = draw(
        st.lists(
            st.integers(1, NUM_LAYERS - 1), min_size=parts - 1, max_size=parts - 1, unique=True
        )
    )
    edges = [0, *sorted(cuts), NUM_LAYERS]
    return tuple(after - before for before, after in pairwise(edges))


@st.composite
def legal_plans(draw: st.DrawFn, most_stages: int = 4) -> Plan:
    """Any plan of runtime torch with like stages: every knob, uneven layers, counts of each."""
    pp = draw(st.sampled_from([n for n in (1, 2, 4) if n <= most_stages]))
    vpp = draw(st.sampled_from([1, 2])) if pp > 1 else 1
    tp, dp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4, 8]))
    micro_batch, rounds = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 3]))
    zero = draw(st.integers(0, 3))
    kinds = [kind_of(vpp), ScheduleKind.GPIPE] if vpp == 1 and pp > 1 else [kind_of(vpp)]
    counts = st.lists(st.integers(0, 3), min_size=pp, max_size=pp)
    words = counts.map(lambda each: ",".join(map(str, each)))
    weights = draw(st.sampled_from([0.0, 0.0, 1.0])) if zero > 1 else 0.0
    layout = HandLayout(
        tp=tp,
        pp=pp,
        vpp=vpp,
        zero=zero,
        micro_batch=micro_batch,
        dp_replicate=draw(st.sampled_from([1, 1, 2])),
        schedule=draw(st.sampled_from(kinds)),
        checkpoint=draw(st.one_of(st.sampled_from(["none", "full", "selective"]), words)),
        offload=Offload(
            weights=weights, grads=weights, optimizer=draw(st.sampled_from([0.0, 0.0, 0.5, 1.0]))
        ),
        layers=draw(splits(pp * vpp)),
    )
    question = Question(
        model="toy.py",
        num_gpus=tp * pp * dp,
        gpu="h100-sxm",
        seq_len=SEQ_LEN,
        global_batch=dp * micro_batch * pp * rounds,
        precision=draw(st.sampled_from([Precision.BF16, Precision.FP32])),
    )
    try:
        return plan_by_hand(question, layout)[1]
    except InputError:
        assume(False)
        raise
