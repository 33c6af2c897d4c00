"""Two steps under `accelerate launch` with an exported file, on the CPU.

launch.sh accelerate_train.py CASE, in the case's own folder. Of accelerate only the device is
changed: it takes FSDP for a feature of GPUs, and the CPU for one rank.
"""

import os
import sys
from pathlib import Path
from runpy import run_path

import accelerate
import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM
from two_losses import LR, STEPS, compare, samples

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)

case = Path(sys.argv[1]).resolve()
folder = case.parents[1]
words = run_path(str(case / "training_arguments.py"))["TRAINING_ARGUMENTS"]
accelerator = accelerate.Accelerator()
ranks, rank = accelerator.num_processes, accelerator.process_index
# Layers that run again would add to a cache of keys twice; a Trainer switches it off itself.
model = AutoModelForCausalLM.from_pretrained(
    folder / "model", dtype=torch.float32, attn_implementation="eager", use_cache=False
)
optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
model, optimizer = accelerator.prepare(model, optimizer)
losses = []
for step in range(STEPS):
    total = torch.zeros(())
    batch = samples(folder, step, words["per_device_train_batch_size"], ranks, rank)
    assert len(batch) == words["gradient_accumulation_steps"]
    for ids in batch:
        loss = model(input_ids=ids, labels=ids).loss / len(batch)
        accelerator.backward(loss)
        total += loss.detach()
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(total)
    losses.append(float(total) / ranks)
if accelerator.is_main_process:
    compare(case, losses, f"accelerate {accelerate.__version__}")
dist.destroy_process_group()
