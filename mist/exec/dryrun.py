"""One rank of a plan's real program, on fake tensors and a fake process group.

The model is built, divided and trained for a step by the same code as in `mist apply`; tensors have
shapes but no memory, collectives move nothing, so that any rank of any number can be looked at on
one CPU. Composite operations run by the kernels of a GPU (`trace.shim`) or by this CPU's.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from mist.exec.adamw import Settings
from mist.exec.anatomy import examine
from mist.exec.parallel import Parallel, assemble, subject_of
from mist.plans import Plan
from mist.spec import Attention, Precision
from mist.trace.fake import tables_of
from mist.trace.loader import LoadedModel, load_model, local_modules
from mist.trace.shim import runs_as
from mist.trace.source import Policy, PythonSource, Setting, resolve


@contextmanager
def pretended(rank: int, world_size: int) -> Iterator[None]:
    """Within: this process is one rank of a process group that moves nothing."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def load_shapes(source: str, attention: Attention) -> LoadedModel:
    """The model of a plan without values: parameters on the meta device, buffers unset.

    Raises ModelError when the source does not give a model.
    """
    found = resolve(source)
    path = found.path if isinstance(found, PythonSource) else None
    with local_modules(path):
        loaded = load_model(found, precision=Precision.FP32, attention=attention)
    for module in loaded.module.modules():
        for table in tables_of(module):
            for name, value in table.items():
                if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                    table[name] = torch.empty_like(value, device="cpu")
    return loaded
