"""Two steps of torchtitan's own Trainer with an exported package, on the CPU.

launch.sh torchtitan_train.py CASE, in place of torchtitan.train. torchtitan reads the weights from
the file of Hugging Face. For the CPU there are other devices, another attention (FlexAttention has
no backward pass there), and no timeouts of NCCL and statistics of memory; the tokens are ours.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

torch._utils._get_available_device_type = lambda: "cpu"  # before it is imported there

from mist_plan.config_registry import mist_plan  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torch.distributed.pipelining import schedules  # noqa: E402
from torchtitan.components import metrics  # noqa: E402
from torchtitan.components.checkpoint import CheckpointManager  # noqa: E402
from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.distributed import utils as distributed  # noqa: E402
from torchtitan.models.common.attention import FlexAttention  # noqa: E402
from two_losses import LR, STEPS, compare, next_tokens, samples  # noqa: E402

case = Path(sys.argv[1]).resolve()
folder = case.parents[1]


class Tokens(BaseDataLoader):
    """The samples of one data-parallel rank, a batch of torchtitan's at a time."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """Nothing to set."""

    def __init__(
        self, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **_: object
    ) -> None:
        self._of_rank = (local_batch_size, dp_world_size, dp_rank)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for step in range(STEPS):
            for ids in samples(folder, step, *self._of_rank):
                yield {"input": ids}, next_tokens(ids)

    def state_dict(self) -> dict[str, object]:
        """Nothing is saved."""
        return {}

    def load_state_dict(self, _: dict[str, object]) -> None:
        """Nothing is loaded."""


class NoTokenizer(BaseTokenizer):
    """There is no text."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        """Nothing to set."""

    def __init__(self, **_: object) -> None:
        super().__init__()

    encode = decode = get_vocab_size = lambda *_: 0


def causal(self, q_BLNH, k_BLNH, v_BLNH, **given):  # noqa: ANN001, ANN003, ANN201
    """Attention by a kernel of the CPU; its sharding goes by the names of the arguments."""
    heads = (each.transpose(1, 2) for each in (q_BLNH, k_BLNH, v_BLNH))
    out = torch.nn.functional.scaled_dot_product_attention(
        *heads, is_causal=True, scale=given.get("scale"), enable_gqa=bool(given.get("enable_gqa"))
    )
    return out.transpose(1, 2)


def storage_wise(operations: list[Any], desc: str | None = None) -> list[Any]:
    """Transfers of a pipeline, storage as it lies, as NCCL has them; gloo refuses other strides."""
    for each in operations:
        each.tensor = each.tensor.as_strided((each.tensor.numel(),), (1,))
    return batched(operations, desc)


batched, schedules._batch_p2p = schedules._batch_p2p, storage_wise
FlexAttention.forward = causal
distributed.set_pg_timeouts = lambda **_: None
stats = SimpleNamespace(max_reserved_gib=0.0, max_reserved_pct=0.0)
metrics.build_device_memory_monitor = lambda: SimpleNamespace(
    device_name="CPU", get_peak_stats=lambda: stats, reset_peak_stats=lambda: None
)

config = mist_plan()
config.dump_folder = str(case / "torchtitan")
config.hf_assets_path = str(folder / "model")
config.tokenizer, config.dataloader = NoTokenizer.Config(), Tokens.Config()
config.training.steps = STEPS
config.training.max_norm = 1.0
config.training.disable_cuda_graphs = True
config.optimizer = default_adamw(lr=LR)
config.lr_scheduler = LRSchedulersContainer.Config(warmup_steps=0, decay_ratio=0.0)
config.validator.enable = False
config.checkpoint = CheckpointManager.Config(
    enable=True, initial_load_path=config.hf_assets_path, initial_load_in_hf=True
)
trainer = config.build()
for module in (each for part in trainer.model_parts for each in part.modules()):
    if isinstance(module, FSDPModule):
        module.set_force_sum_reduction_for_comms(True)  # gloo has no sum of scaled values
losses: list[float] = []
trainer.metrics_processor.log = lambda _, loss, *__, **___: losses.append(loss)
trainer.checkpointer.save = lambda *_, **__: None
trainer.train()
# With a pipeline only the last stage has the loss: the rank at the end is one of it.
if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
    compare(case, losses, "torchtitan")
torch.distributed.destroy_process_group()
