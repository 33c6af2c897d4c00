"""Two steps of Megatron's own model and schedules with exported arguments, on the CPU.

torchrun megatron_train.py CASE. Its layers, tensor and pipeline parallelism, recomputation and
cross-entropy are run as they are; the weights are cut from the file of Hugging Face, and gradients
are summed and clipped here, because its optimizers are those of a GPU. For the CPU there are other
devices, no generators of dropout, and a norm that leaves the sequence divided.
"""

import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron_args import arguments_of
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from two_losses import LR, SAMPLES, STEPS, compare, next_tokens, samples

torch.cuda.current_device = lambda: "cpu"
torch.cuda.synchronize = lambda *_: None


class OnCpu(TorchFunctionMode):
    """Tensors that are made on a GPU by its name."""

    def __torch_function__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        words = dict(kwargs or {})
        if words.get("device") == "cuda":
            words["device"] = "cpu"
        return function(*args, **words)


OnCpu().__enter__()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer import torch_norm  # noqa: E402
from megatron.training.arguments import core_transformer_config_from_args  # noqa: E402

case = Path(sys.argv[1]).resolve()
folder = case.parents[1]
dist.init_process_group("gloo")
more = "--use-cpu-initialization --no-gradient-accumulation-fusion --no-masked-softmax-fusion "
more += "--no-bias-swiglu-fusion --no-bias-dropout-fusion --attention-backend unfused "
more += "--attention-dropout 0 --hidden-dropout 0 --make-vocab-size-divisible-by 1"
args = arguments_of(case, 2048, *more.split())
parallel_state.initialize_model_parallel(
    args.tensor_model_parallel_size,
    args.pipeline_model_parallel_size,
    args.virtual_pipeline_model_parallel_size,
)
tp, tp_rank = args.tensor_model_parallel_size, parallel_state.get_tensor_model_parallel_rank()
# Nothing is dropped, so that no generator matters.
tensor_parallel.random.CudaRNGStatesTracker.fork = lambda *_: nullcontext()
tensor_parallel.random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
tensor_parallel.random._set_cuda_rng_state = lambda *_, **__: None


def divided_norm(_: type, config: object, hidden_size: int, eps: float, **__: object) -> object:
    """A norm whose weight is known to see a part of the sequence: its gradients are parts."""
    norm = torch.nn.RMSNorm(hidden_size, eps)
    norm.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


torch_norm.WrappedTorchNorm.__new__ = divided_norm
config = core_transformer_config_from_args(args)
config.pipeline_dtype = torch.float32
model = GPTModel(
    config,
    get_gpt_layer_local_spec(normalization="RMSNorm"),
    args.vocab_size,
    args.max_position_embeddings,
    pre_process=parallel_state.is_pipeline_first_stage(),
    post_process=parallel_state.is_pipeline_last_stage(),
    position_embedding_type=args.position_embedding_type,
    rotary_base=args.rotary_base,
    rope_scaling=args.use_rope_scaling,
    rope_scaling_factor=args.rope_scaling_factor,
)
weights = load_file(folder / "model" / "model.safetensors")
NAMES = {
    "embedding.word_embeddings": "model.embed_tokens",
    "output_layer": "lm_head",
    "decoder.final_layernorm": "model.norm",
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "self_attention.linear_proj": "self_attn.o_proj",
    "mlp.linear_fc2": "mlp.down_proj",
}


def part(weight: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """That of this tensor-parallel rank."""
    return weight.chunk(tp, dim)[tp_rank]


def weight_of(name: str) -> torch.Tensor:
    """The part of a parameter that this rank has, from the weights of Hugging Face."""
    if not name.startswith("decoder.layers."):
        weight = weights[f"{NAMES[name]}.weight"]
        return weight if "norm" in name else part(weight)
    _, _, local, *rest = name.split(".")
    layer = model.decoder.layers[int(local)].layer_number - 1
    above, last = f"model.layers.{layer}", ".".join(rest)
    if last == "mlp.linear_fc1":
        return torch.cat(
            [part(weights[f"{above}.mlp.{each}_proj.weight"]) for each in ("gate", "up")]
        )
    if last == "self_attention.linear_qkv":  # the heads of a group stand together
        heads = [weights[f"{above}.self_attn.{each}_proj.weight"] for each in "qkv"]
        groups = [each.view(args.num_query_groups, -1, args.hidden_size) for each in heads]
        return part(torch.cat(groups, dim=1)).reshape(-1, args.hidden_size)
    weight = weights[f"{above}.{NAMES[last]}.weight"]
    return weight if "norm" in last else part(weight, dim=1)


with torch.no_grad():
    for name, parameter in model.named_parameters():
        parameter.copy_(weight_of(name.removesuffix(".weight")))
optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)


def mean_of(labels: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, object]]:
    """The mean over the tokens that have a label."""
    loss = losses[labels >= 0].mean()
    return loss, {"loss": loss.detach().clone()}  # it is divided in place


def forward_step(batches: object, stage: torch.nn.Module) -> tuple[torch.Tensor, object]:
    """One micro-batch through a stage."""
    ids = next(batches)  # type: ignore[call-overload]
    labels, places = next_tokens(ids), torch.arange(ids.shape[1]).expand_as(ids)
    return stage(ids, places, None, labels=labels), partial(mean_of, labels)


def sum_gradients() -> None:
    """Over the ranks that have parts of them: of the batch, and of the sequence of a norm."""
    dp = parallel_state.get_data_parallel_group()
    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())
        dist.all_reduce(parameter.grad, group=dp)
        parameter.grad /= dist.get_world_size(dp)


def clip() -> None:
    """To norm 1, over all stages and parts; what ranks have alike counts once."""
    squares = torch.zeros(())
    for parameter in model.parameters():
        if tp_rank == 0 or getattr(parameter, "tensor_model_parallel", False):
            squares += parameter.grad.square().sum()
    dist.all_reduce(squares, group=parallel_state.get_model_parallel_group())
    for parameter in model.parameters():
        parameter.grad *= min(1.0, 1.0 / (float(squares.sqrt()) + 1e-6))


losses = []
micro_batch, dp = args.micro_batch_size, args.data_parallel_size
for step in range(STEPS):
    ids = samples(folder, step, micro_batch, dp, parallel_state.get_data_parallel_rank())
    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(ids),
        model=model,
        num_microbatches=SAMPLES // (micro_batch * dp),
        seq_length=args.seq_length,
        micro_batch_size=micro_batch,
    )
    sum_gradients()
    clip()
    optimizer.step()
    optimizer.zero_grad()
    if found:  # on the last stage
        total = torch.stack([each["loss"] for each in found]).mean()
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        losses.append(float(total) / dp)
if dist.get_rank() == dist.get_world_size() - 1:
    compare(case, losses, "megatron-core 0.19.2")
dist.destroy_process_group()
