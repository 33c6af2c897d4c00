"""The layouts that must agree with one process."""

from mist.plans.plan import Offload
from mist.plans.workload import HeadMode, Precision, ScheduleKind
from tests.exec.layouts import S, Variant

GPIPE, INTERLEAVED = ScheduleKind.GPIPE, ScheduleKind.INTERLEAVED
CHECKPOINTED, IN_FORWARD = HeadMode.CHECKPOINTED, HeadMode.IN_FORWARD
ZERO_BUBBLE = ScheduleKind.ZERO_BUBBLE


def _offload(**ratios: float) -> Offload:
    return Offload(**ratios)


DATA = (
    *(Variant(name=f"zero{z}", stages=(S(dp=2, zero=z),)) for z in range(4)),
    *(Variant(name=f"zero{z} accumulated", stages=(S(dp=2, zero=z),), micro=4) for z in range(4)),
    Variant(name="clipped", stages=(S(dp=2, zero=3),), micro=4, max_norm=0.5),
    Variant(name="full 4 zero3", stages=(S(dp=2, zero=3, full=4),), micro=8),
    Variant(
        name="mixed levels zero2",
        stages=(S(dp=2, zero=2, full=1, sdpa_only=1, sac_half=1),),
        micro=8,
    ),
    Variant(
        name="converted zero3",
        stages=(S(dp=2, zero=3, full=1, drop_norm=1, drop_activation=1),),
        micro=8,
    ),
    Variant(
        name="gpt2 converted zero2",
        model="gpt2.json",
        stages=(S(dp=2, zero=2, drop_norm=1, tempo=1, selective=1),),
        micro=8,
    ),
    Variant(
        name="head checkpointed zero3",
        stages=(S(dp=2, zero=3, drop_norm=2, head=CHECKPOINTED),),
        micro=8,
        max_norm=0.5,
    ),
    Variant(name="gpt2 tied zero3", model="gpt2.json", stages=(S(dp=2, zero=3),)),
    Variant(name="plain zero1", model="plain.py", stages=(S(dp=2, zero=1),), micro=4),
)
TENSOR = (
    Variant(name="tp2", stages=(S(tp=2),), micro=8),
    Variant(name="tp2 sp", stages=(S(tp=2, sp=True),), micro=8),
    Variant(name="tp2 sp clipped", stages=(S(tp=2, sp=True, zero=1),), max_norm=0.5),
    Variant(
        name="tp2 sp levels",
        stages=(S(tp=2, sp=True, full=1, selective=1, sac_half=1, sdpa_only=1),),
    ),
    Variant(name="tied tp2 sp", model="tied.json", stages=(S(tp=2, sp=True),), micro=8),
    Variant(name="gpt2 tied tp2", model="gpt2.json", stages=(S(tp=2),), micro=8),
    Variant(
        name="gpt2 tied tp2 sp clipped",
        model="gpt2.json",
        stages=(S(tp=2, sp=True),),
        micro=8,
        max_norm=0.5,
    ),
    Variant(name="gemma2 tied tp2 sp", model="gemma2.json", stages=(S(tp=2, sp=True),), micro=8),
    Variant(name="one-kv-head tp2", model="one-kv-head.json", stages=(S(tp=2),), micro=8),
    Variant(
        name="one-kv-head tp2 sp", model="one-kv-head.json", stages=(S(tp=2, sp=True),), micro=8
    ),
    Variant(name="opt tied tp2", model="opt.json", stages=(S(tp=2),), micro=8),
    Variant(name="opt tied tp2 sp", model="opt.json", stages=(S(tp=2, sp=True),), micro=8),
    Variant(name="qwen3 tp2 sp", model="qwen3.json", stages=(S(tp=2, sp=True),), micro=8),
    Variant(name="plain tp2", model="plain.py", stages=(S(tp=2),)),
    Variant(name="plain tp2 sp", model="plain.py", stages=(S(tp=2, sp=True),)),
    *(
        Variant(name=f"dp2 tp2 sp zero{z}", stages=(S(dp=2, tp=2, sp=True, zero=z),), micro=8)
        for z in (0, 2, 3)
    ),
    Variant(
        name="phi3 dp2 tp2 sp zero3",
        model="phi3.json",
        stages=(S(dp=2, tp=2, sp=True, zero=3),),
        micro=8,
    ),
    Variant(
        name="gpt2 tied dp2 tp2 sp zero3",
        model="gpt2.json",
        stages=(S(dp=2, tp=2, sp=True, zero=3),),
        micro=8,
    ),
    Variant(name="dp2 tp2 zero3 clipped", stages=(S(dp=2, tp=2, zero=3),), max_norm=0.5),
)
FROZEN = (
    Variant(name="frozen upper zero3", model="upper.py", stages=(S(dp=2, zero=3),), micro=4),
    Variant(name="frozen norms zero2", model="norms.py", stages=(S(dp=2, zero=2),), micro=4),
    Variant(
        name="frozen head levels zero0",
        model="head.py",
        stages=(S(dp=2, full=2, selective=1),),
        micro=8,
        max_norm=0.5,
    ),
    Variant(name="frozen upper tp2 sp", model="upper.py", stages=(S(tp=2, sp=True),), micro=8),
    Variant(name="frozen norms tp2", model="norms.py", stages=(S(tp=2),), max_norm=0.5),
    Variant(
        name="frozen upper pp2",
        model="upper.py",
        stages=(S(layers=(2,)), S(layers=(2,))),
        micro=4,
        max_norm=0.5,
    ),
    Variant(
        name="frozen head pp2",
        model="head.py",
        stages=(S(layers=(1,)), S(layers=(3,), full=1)),
        micro=4,
    ),
    Variant(
        name="frozen amid pp2",
        model="amid.py",
        stages=(S(layers=(1,), full=1), S(layers=(3,), full=2)),
        micro=4,
    ),
    Variant(
        name="frozen amid interleaved",
        model="amid.py",
        kind=INTERLEAVED,
        stages=(S(layers=(1, 1)), S(layers=(1, 1))),
        micro=4,
    ),
    Variant(
        name="frozen upper zero-bubble",
        model="upper.py",
        kind=ZERO_BUBBLE,
        stages=(S(layers=(1, 1)), S(layers=(1, 1))),
        micro=4,
    ),
    Variant(
        name="frozen inputs zero-bubble",
        model="inputs.py",
        kind=ZERO_BUBBLE,
        stages=(S(layers=(2,)), S(layers=(2,))),
        micro=4,
    ),
    Variant(
        name="frozen norms offload",
        model="norms.py",
        stages=(S(dp=2, zero=3, offload=_offload(weights=0.5, grads=0.5, optimizer=0.5)),),
        micro=8,
    ),
)
PIPELINE = (
    Variant(
        name="tied pp2",
        model="tied.json",
        stages=(S(layers=(1,)), S(layers=(3,))),
        micro=4,
        max_norm=0.5,
    ),
    Variant(name="pp2 1+3", stages=(S(layers=(1,)), S(layers=(3,))), micro=4),
    Variant(name="pp2 gpipe", kind=GPIPE, stages=(S(layers=(2,)), S(layers=(2,))), micro=4),
    Variant(
        name="pp2 interleaved",
        kind=INTERLEAVED,
        stages=(S(layers=(1, 1)), S(layers=(1, 1))),
        micro=4,
    ),
    Variant(
        name="pp2 zero-bubble",
        kind=ZERO_BUBBLE,
        stages=(S(layers=(2,)), S(layers=(2,))),
        micro=4,
    ),
    Variant(
        name="pp2 zero-bubble vpp2",
        kind=ZERO_BUBBLE,
        stages=(S(layers=(1, 1)), S(layers=(1, 1))),
        micro=4,
    ),
    Variant(  # layers that give views, which a chunk in the middle would pass on
        name="opt tied pp2 zero-bubble vpp2",
        model="opt.json",
        kind=ZERO_BUBBLE,
        stages=(S(layers=(1, 1)), S(layers=(1, 1))),
        micro=4,
    ),
    Variant(
        name="pp2 converted",
        stages=(
            S(layers=(3,), full=1, drop_norm=1, drop_activation=1),
            S(layers=(1,), drop_norm=1),
        ),
        micro=4,
    ),
    Variant(
        name="gpt2 tied pp2 head in-forward",
        model="gpt2.json",
        stages=(S(layers=(2,)), S(layers=(2,), head=IN_FORWARD)),
        micro=4,
    ),
    Variant(
        name="pp2 levels clipped",
        stages=(S(layers=(2,), full=1), S(layers=(2,), selective=1)),
        micro=4,
        max_norm=0.5,
    ),
    Variant(
        name="gpt2 tied pp2 clipped",
        model="gpt2.json",
        stages=(S(layers=(1,)), S(layers=(3,))),
        micro=4,
        max_norm=0.5,
    ),
    Variant(
        name="opt tied pp2",
        model="opt.json",
        stages=(S(layers=(2,)), S(layers=(2,))),
        micro=4,
    ),
    Variant(name="plain pp2", model="plain.py", stages=(S(layers=(3,)), S(layers=(1,))), micro=4),
    Variant(name="pp3 1+2+1", stages=(S(layers=(1,)), S(layers=(2,)), S(layers=(1,))), micro=4),
    *(
        Variant(
            name=f"pp2 dp2 zero{z}",
            stages=(S(layers=(1,), dp=2, zero=z), S(layers=(3,), dp=2, zero=z)),
            micro=4,
        )
        for z in range(4)
    ),
    Variant(
        name="pp2 tp2 sp",
        stages=(S(layers=(1,), tp=2, sp=True), S(layers=(3,), tp=2, sp=True)),
        micro=4,
    ),
    Variant(
        name="pp2 interleaved dp2 zero3",
        kind=INTERLEAVED,
        stages=(S(layers=(1, 1), dp=2, zero=3), S(layers=(1, 1), dp=2, zero=3)),
        micro=4,
    ),
    Variant(
        name="pp2 zero-bubble dp2 zero2",
        kind=ZERO_BUBBLE,
        stages=(S(layers=(1, 1), dp=2, zero=2), S(layers=(1, 1), dp=2, zero=2)),
        micro=4,
    ),
    Variant(
        name="gpt2 tied pp2 dp2",
        model="gpt2.json",
        stages=(S(layers=(2,), dp=2, zero=1), S(layers=(2,), dp=2, zero=2)),
        micro=4,
    ),
)
UNLIKE = (
    Variant(
        name="dp2 to tp2", stages=(S(layers=(1,), dp=2, zero=3), S(layers=(3,), tp=2)), micro=4
    ),
    Variant(
        name="tp2 sp to dp2",
        kind=GPIPE,
        stages=(S(layers=(2,), tp=2, sp=True), S(layers=(2,), dp=2, zero=2)),
        micro=4,
        max_norm=0.5,
    ),
    Variant(
        name="dp2 to dp1",
        stages=(S(layers=(3,), dp=2, zero=1), S(layers=(1,))),
        micro=4,
    ),
)
OFFLOAD = (
    *(
        Variant(
            name=f"activations {r}",
            stages=(S(dp=2, zero=2, full=1, offload=_offload(activations=r)),),
            micro=8,
        )
        for r in (0.3, 1.0)
    ),
    *(
        Variant(name=f"optimizer {r}", stages=(S(dp=2, zero=1, offload=_offload(optimizer=r)),))
        for r in (0.3, 1.0)
    ),
    *(
        Variant(
            name=f"weights and grads {r}",
            stages=(S(dp=2, zero=3, offload=_offload(weights=r, grads=r, optimizer=r)),),
            micro=8,
            max_norm=0.5,
        )
        for r in (0.3, 1.0)
    ),
    Variant(
        name="offload all dp1",
        stages=(
            S(
                dp=1,
                zero=2,
                full=2,
                offload=_offload(weights=1, grads=1, optimizer=1, activations=1),
            ),
        ),
        micro=8,
    ),
    Variant(
        name="tp2 sp activations 1.0",
        stages=(S(tp=2, sp=True, full=1, offload=_offload(activations=1.0)),),
    ),
)
ROUNDED = (
    Variant(
        name="fp32 zero2 levels",
        rounded=True,
        stages=(S(dp=2, zero=2, full=2, selective=1),),
        micro=8,
    ),
    Variant(
        name="bf16 zero2 levels",
        precision=Precision.BF16,
        rounded=True,
        stages=(S(dp=2, zero=2, full=2, selective=1),),
        micro=8,
    ),
    Variant(
        name="bf16 tp2 sp offload",
        precision=Precision.BF16,
        rounded=True,
        stages=(S(tp=2, sp=True, full=2, offload=_offload(activations=1.0, optimizer=0.5)),),
        micro=8,
    ),
    Variant(
        name="bf16 pp2",
        precision=Precision.BF16,
        rounded=True,
        stages=(S(layers=(2,)), S(layers=(2,))),
        micro=4,
    ),
)
MIXTURES = tuple(
    Variant(name=f"{model} {kind}", model=f"{model}.json", stages=stages, micro=8)
    for model in ("mixtral", "qwen3-moe", "gpt-oss", "deepseek")
    for kind, stages in {
        "zero3": (S(dp=2, zero=3, full=2),),
        "pp2": (S(layers=(2,)), S(layers=(2,))),
        "tp2": (S(tp=2),),
        "tp2 sp": (S(tp=2, sp=True, full=1),),
        "dp2 tp2 sp zero3": (S(dp=2, tp=2, sp=True, zero=3),),
    }.items()
)
FAST_MIXTURES = tuple(v for v in MIXTURES if v.name in ("mixtral pp2", "deepseek tp2 sp"))
HYBRID = (
    *(Variant(name=f"hsdp zero{z}", stages=(S(dp=4, dp_replicate=2, zero=z),)) for z in (1, 2, 3)),
    *(
        Variant(
            name=f"hsdp zero{z} accumulated",
            stages=(S(dp=4, dp_replicate=2, zero=z, full=1),),
            micro=4,
            max_norm=0.5,
        )
        for z in (1, 2, 3)
    ),
    Variant(
        name="hsdp moments offloaded",
        stages=(S(dp=4, dp_replicate=2, zero=2, offload=_offload(optimizer=0.5)),),
        micro=8,
    ),
)
# Of two ranks, each of a kind that another one shows too: the same model in another layout of the
# kind, or the same layout with another model.
REPEATED = (
    *("zero1", "zero3", "tp2", "tp2 sp clipped", "one-kv-head tp2 sp", "plain tp2 sp", "plain pp2"),
    *("gpt2 tied tp2", "gpt2 tied pp2 clipped", "opt tied tp2", "opt tied pp2"),
    *("pp2 zero-bubble vpp2", "phi3 dp2 tp2 sp zero3", "zero2 accumulated", "plain zero1"),
    *("gpt2 converted zero2", "gpt2 tied zero3", "tied tp2 sp", "opt tied tp2 sp", "pp2 gpipe"),
    *("pp2 converted", "fp32 zero2 levels", "frozen upper tp2 sp", "qwen3 tp2 sp"),
    *("zero0", "zero0 accumulated", "full 4 zero3", "gemma2 tied tp2 sp", "frozen upper zero3"),
    *("one-kv-head tp2", "tied pp2", "pp2 zero-bubble", "pp2 levels clipped", "bf16 zero2 levels"),
    *("activations 1.0", "gpt2 tied pp2 head in-forward", "plain tp2", "mixed levels zero2"),
    *("zero1 accumulated", "head checkpointed zero3", "pp2 interleaved", "frozen head pp2"),
    *("optimizer 1.0", "bf16 tp2 sp offload", "zero2", "clipped", "tp2 sp", "deepseek tp2 sp"),
    *("pp2 1+3", "frozen upper zero-bubble"),
)
_EVERY = (
    *DATA,
    *TENSOR,
    *FROZEN[::3],
    *PIPELINE,
    *UNLIKE,
    *OFFLOAD[1::2],
    *ROUNDED,
    *FAST_MIXTURES,
    *HYBRID,
)
VARIANTS = tuple(variant for variant in _EVERY if variant.name not in REPEATED)

# Of more ranks than a small machine has cores for, and more of what others show too.
SLOW = (
    *(variant for variant in _EVERY if variant.name in REPEATED),
    *(variant for index, variant in enumerate(FROZEN) if index % 3),
    *OFFLOAD[::2],
    *(variant for variant in MIXTURES if variant not in FAST_MIXTURES),
    Variant(
        name="pp2 dp2 tp2 sp zero2",
        stages=(
            S(layers=(1,), dp=2, tp=2, sp=True, zero=2),
            S(layers=(3,), dp=2, tp=2, sp=True, zero=2),
        ),
        micro=4,
        max_norm=0.5,
    ),
    Variant(
        name="pp2 dp2 tp2 zero3",
        stages=(S(layers=(2,), dp=2, tp=2, zero=3), S(layers=(2,), dp=2, tp=2, zero=3)),
        micro=4,
    ),
    Variant(
        name="hsdp tp2 sp zero3",
        stages=(S(dp=4, dp_replicate=2, tp=2, sp=True, zero=3),),
        micro=8,
        max_norm=0.5,
    ),
    Variant(
        name="pp2 hsdp zero2 tied",
        model="tied.json",
        stages=(
            S(layers=(1,), dp=4, dp_replicate=2, zero=2),
            S(layers=(3,), dp=4, dp_replicate=2, zero=2),
        ),
        micro=4,
        max_norm=0.5,
    ),
    Variant(
        name="pp2 zero-bubble hsdp zero2",
        kind=ZERO_BUBBLE,
        stages=(
            S(layers=(2,), dp=4, dp_replicate=2, zero=2),
            S(layers=(2,), dp=4, dp_replicate=2, zero=2),
        ),
        micro=4,
    ),
    Variant(
        name="dp2 tp2 sp to dp4",
        stages=(S(layers=(2,), dp=2, tp=2, sp=True, zero=1), S(layers=(2,), dp=4, zero=3)),
        micro=4,
    ),
    Variant(
        name="dp4 to tp2 sp",
        stages=(S(layers=(1,), dp=4, zero=3), S(layers=(3,), tp=2, sp=True)),
        micro=4,
    ),
    Variant(
        name="pp2 converted, 20 steps",
        stages=(
            S(layers=(3,), sdpa_only=1, drop_norm=1, drop_activation=1),
            S(layers=(1,), tempo=1),
        ),
        micro=4,
        num_steps=20,
    ),
    Variant(
        name="dp2 head in-forward, 20 steps",
        stages=(S(dp=2, zero=2, head=IN_FORWARD, drop_norm=4),),
        micro=8,
        num_steps=20,
    ),
    Variant(
        name="pp2 head checkpointed, 20 steps",
        model="plain.py",
        stages=(S(layers=(2,)), S(layers=(2,), head=CHECKPOINTED)),
        micro=4,
        num_steps=20,
    ),
    Variant(  # converted layers are not divided: mixed levels of those that are
        name="dp2 tp2 sp levels, 20 steps",
        stages=(S(dp=2, tp=2, sp=True, zero=2, sdpa_only=1, sac_half=1, selective=1),),
        micro=8,
        num_steps=20,
    ),
    Variant(
        name="pp2 dp2 tp2 sp levels, 20 steps",
        stages=(
            S(layers=(3,), dp=2, tp=2, sp=True, zero=2, full=1, sac_half=1, sdpa_only=1),
            S(layers=(1,), dp=2, tp=2, sp=True, zero=2, selective=1),
        ),
        micro=4,
        num_steps=20,
    ),
    Variant(
        name="dp2 tp2 to converted dp4, 20 steps",
        stages=(
            S(layers=(2,), dp=2, tp=2, zero=1, full=1),
            S(layers=(2,), dp=4, zero=3, drop_norm=1, drop_activation=1),
        ),
        micro=4,
        num_steps=20,
    ),
    Variant(
        name="tp2 to dp2 to dp2",
        stages=(S(layers=(1,), tp=2), S(layers=(2,), dp=2, zero=2), S(layers=(1,), dp=2, zero=0)),
        micro=4,
    ),
)
