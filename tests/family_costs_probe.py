import torch
from dataclasses import replace
from torch.utils._pytree import tree_map, tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop, sdpa_backward_flop
from mist.exec.build.empty_weights import load_within, deferred
from mist.trace.models.source import ConfigSource, TraceSetting
from mist.trace.models.loader import load_model
from mist.trace.model_trace import trace
from mist.plans.workload import Attention, Precision
from mist.trace.repeated_blocks import find_layers
from mist.model.graph import OpKind
from tests.trace.test_exact import at, flop, saved_bytes
from tests.trace import real

aten = torch.ops.aten


def grouped(x, w, offs=None, *a, out_shape=None, **k):
    # rows of experts
    if len(x) == 2 and len(w) == 3:
        return 2 * x[0] * x[1] * w[2]
    if len(x) == 2 and len(w) == 2:
        return 2 * x[0] * x[1] * w[1]
    raise ValueError((x, w))


EXTRA = {
    aten._grouped_mm: grouped,
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *a, **kw: sdpa_flop(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *a, **kw: (
        sdpa_backward_flop(g, q, k, v)
    ),
}


def source(name, config):
    return ConfigSource(label=name, name=name, config=dict(config))


def setting(s):
    return TraceSetting(
        precision=Precision.FP32, attention=Attention.FLASH, policy="cpu", seq_len=s
    )


def zeros(x):
    return torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, torch.Tensor) else x


def real_model(src):
    with deferred():
        loaded = load_model(src, precision=Precision.FP32, attention=Attention.FLASH)
    m = loaded.module
    seen = {}
    for mod in m.modules():
        for k, p in list(mod._parameters.items()):
            if p is not None:
                mod._parameters[k] = seen.setdefault(
                    id(p), torch.nn.Parameter(torch.randn(p.shape) * 0.02, p.requires_grad)
                )
    m.train()
    return loaded


def inputs(loaded, layer, batch):
    seen = []
    h = layer.register_forward_pre_hook(lambda m, a, k: seen.append((a, k)), with_kwargs=True)
    loaded.forward(batch)
    h.remove()
    return seen[0]


def run(name, config, points):
    src = source(name, config)
    graphs = []
    loaded = real_model(src)
    layers = find_layers(loaded.module)
    mods = layers.modules
    names = {id(m): n for n, m in loaded.module.named_modules()}
    bad = 0
    regimes = []
    for b, s in points:
        g = next((x for x in graphs if s in x.lengths), None)
        if g is None:
            g = trace(
                load_model(src, precision=Precision.FP32, attention=Attention.FLASH),
                setting(s),
                lambda m: None,
            ).graph
            graphs.append(g)
            regimes.append((s, g.lengths))
            if s not in g.lengths:
                print("  REGIME", s, g.lengths)
        kinds = [k for k in g.layer_kinds() if g.blocks[k].name != "between"]
        if len(kinds) != len(mods):
            print("  KINDS", kinds, len(mods), g.notes)
        batch = tree_map(zeros, loaded.batch(b, s))
        for k in dict.fromkeys(kinds):
            layer = mods[kinds.index(k) if len(kinds) == len(mods) else 0]
            block = g.blocks[k]
            r = measure(loaded, layer, batch)
            sv = saved_bytes(block.saved_single if b == 1 else block.saved, b, s)
            mine = dict(
                saved_bytes=sv,
                live_bytes=sv,
                transient_bytes=max(at(x, b, s) for x in block.transient_bytes),
                transient_with_grads_bytes=max(
                    at(x, b, s) for x in block.transient_with_grads_bytes
                ),
                transient_adding_bytes=max(at(x, b, s) for x in block.transient_adding_bytes),
                forward_flop=sum(flop(block, "forward", kind, b, s) for kind in OpKind),
                backward_flop=sum(flop(block, "backward", kind, b, s) for kind in OpKind),
            )
            for key, v in mine.items():
                if v != r[key]:
                    print(
                        f"  DIFF {name} {names[id(layer)]} ({b},{s}) {key}: traced {v} real {r[key]} d={v - r[key]}"
                    )
                    bad += 1
            if g.notes and b == 1 and k == kinds[0]:
                print("  notes", g.notes, g.tp_limits and [str(x) for x in g.tp_limits])
    print("RESULT", name, "ok" if not bad else f"{bad} diffs", regimes)


def measure(loaded, layer, batch):
    args, kwargs = inputs(loaded, layer, batch)

    def leaf(x):
        if not isinstance(x, torch.Tensor):
            return x
        y = x.detach()
        return y.requires_grad_(x.requires_grad).view_as(y) if x.requires_grad else y

    args, kwargs = tree_map(leaf, (args, kwargs))
    model = loaded.module
    from functools import partial

    mixed = partial(torch.autocast, "cpu", dtype=None, enabled=False)
    hidden = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
    if not args:
        args = (hidden,)
        kwargs = {k: v for k, v in kwargs.items() if v is not hidden}
    shared = [
        *model.parameters(),
        *model.buffers(),
        *[t for t in real._tensors((args[1:], kwargs))],
    ]
    known = {t.untyped_storage()._cdata for t in shared}
    layer.zero_grad(set_to_none=True)
    saved, live, (transient, with_grads) = real._bytes(layer, args, kwargs, known, mixed)
    held = real._hold_gradients(layer)
    _, _, (_, adding) = real._bytes(layer, args, kwargs, known | held, mixed)
    layer.zero_grad(set_to_none=True)
    with FlopCounterMode(display=False, custom_mapping=EXTRA) as forward:
        full = layer(*args, **kwargs)
        out = real._first(full)
    with FlopCounterMode(display=False, custom_mapping=EXTRA) as backward:
        sum(t.sum() for t in real._tensors(full) if t.requires_grad).backward()
    return dict(
        saved_bytes=saved,
        live_bytes=live,
        transient_bytes=transient,
        transient_with_grads_bytes=with_grads,
        transient_adding_bytes=adding,
        forward_flop=forward.get_total_flops(),
        backward_flop=backward.get_total_flops(),
    )
