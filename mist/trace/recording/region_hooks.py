"""Where the regions that tensor parallelism divides are entered and left, noted by hooks.

The input of a column-parallel matrix is gathered where it enters its region. `mist apply` gathers
it at a module that is given it: a matrix whose input no module around it was given is exposed.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from mist.trace.dispatch_call import key_of, tensors_in
from mist.trace.recording.recorded_part import Entered
from mist.trace.recording.recorder import Recorder
from mist.trace.tensor_parallel.tp_sharding import Sharding, entering, matrix_of


@contextmanager
def region_hooks(recorder: Recorder, sharding: Sharding, model: nn.Module) -> Iterator[None]:
    """Within: inputs of column-parallel matrices are known as gathered, and what goes back."""
    given: dict[int, frozenset[int]] = {}

    def note(module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        given[id(module)] = frozenset(map(id, tensors_in((args, kwargs))))

    def gather(module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        if recorder.part is not None:
            # Where a matrix is no module of its own, the module around it is given its input.
            around = recorder.callers[:-1] if matrix_of(module) else recorder.callers
            for x in entering(module, args, kwargs):
                recorder.part.gathered.add(key_of(x))
                entry = Entered(recorder.part.identity(x), recorder.bytes_of(x))
                recorder.part.entered.setdefault(id(module), []).append(entry)
                if not any(id(x) in given[id(outer)] for outer in around):
                    recorder.part.exposed.add(id(module))
            flow(module, args, (args, kwargs))

    def flow(module: nn.Module, args: object, tensors: object) -> None:
        """A gradient goes back through what a module is given, or gives."""
        if recorder.part and any(t.requires_grad for t in tensors_in(tensors)):
            recorder.part.flows.add(id(module))

    modules = list(model.modules())
    entered = sharding.colwise.union(*(region.entered for region in sharding.regions))
    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in modules]
    hooks += [
        m.register_forward_pre_hook(gather, with_kwargs=True) for m in modules if id(m) in entered
    ]
    hooks += [m.register_forward_hook(flow) for m in modules if id(m) in sharding.ends]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
