"""What a model does that cannot be traced, and the line that is named."""

import re
from pathlib import Path

import pytest

from mist.errors import TraceError
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, load_graph
from mist.trace.diagnose import traced
from tests.trace.test_source import file_with, load

HEAD = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.head = nn.Linear(16, 64)

    def forward(self, ids):
        x = self.embed(ids)
        BODY
        return self.head(x)

def build_model():
    return Model()
"""


def message_of(folder: Path, body: str) -> str:
    path = file_with(folder, HEAD.replace("BODY", body))
    with pytest.raises(TraceError) as error:
        load(path)
    return str(error.value).replace(str(path), "FILE")


def test_branch_on_values(tmp_path: Path) -> None:
    assert message_of(tmp_path, "x = x * 2 if x.sum().item() > 0 else x") == (
        "my-model decides by the values of its tensors "
        "(FILE:13: x = x * 2 if x.sum().item() > 0 else x). Mist traces shapes only: replace the "
        "branch or .item() by an operation on tensors, such as torch.where."
    )


def test_size_from_values(tmp_path: Path) -> None:
    assert message_of(tmp_path, "x = x[ids.nonzero()[:, 0]]") == (
        "a size depends on the values of tensors (torch names it u0), not only on batch and "
        "sequence length. Replace what selects by value (nonzero, boolean indexing, ...) by one "
        "whose output shape is fixed. Experts that select their tokens are recognised where their "
        "module, or one around it, has the attributes num_experts and top_k."
    )


def test_one_sequence_length_only(tmp_path: Path) -> None:
    """It is traced at that length; at another, the line that has the size is named."""
    line = "x = x + torch.zeros(1, 384, 16)"
    path = file_with(tmp_path, HEAD.replace("BODY", line))
    load(path)
    setting = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH, seq_len=512)
    with pytest.raises(TraceError, match=rf"cannot be traced: .* 384 .*:13: {re.escape(line)}"):
        load_graph(str(path), setting, progress=lambda message: None)


def test_model_raises(tmp_path: Path) -> None:
    assert message_of(tmp_path, "x = self.missing(x)") == (
        "my-model cannot be traced: AttributeError: 'Model' object has no attribute 'missing' "
        "(FILE:13: x = self.missing(x)). Check that the model runs on token ids of the length "
        "that is asked (--seq), or define make_batch(batch, seq)."
    )


@pytest.mark.parametrize(
    ("raised", "file", "words"),
    [
        (
            "RuntimeError('expected scalar type Float but found BFloat16')",
            "net",
            "--precision fp32",
        ),
        (
            "RuntimeError('view_as_complex is not supported for BFloat16')",
            "net",
            "--precision fp32",
        ),
        ("AssertionError", "/site-packages/bitsandbytes/modules", "frozen nn.Linear"),
        ("AssertionError", "net", "or define make_batch"),
    ],
)
def test_advice_for_faults_that_are_known(raised: str, file: str, words: str) -> None:
    code = compile(f"raise {raised}", f"{file}.py", "exec")
    with pytest.raises(TraceError, match=f"^net cannot be traced: .*{words}"), traced("net"):
        exec(code)


def test_operation_without_formula(tmp_path: Path) -> None:
    assert message_of(
        tmp_path, "x = x + torch.linalg.inv(x.float().mT @ x.float()).sum().to(x.dtype)"
    ) == (
        "operation aten.linalg_inv_ex does heavy arithmetic that Mist has no FLOP formula for, so "
        "its time would be counted as zero. Use a layer built from linear, matmul, convolution or "
        "scaled_dot_product_attention in its place."
    )


def test_model_without_a_loss(tmp_path: Path) -> None:
    assert message_of(tmp_path, "return {'a': {}}") == (
        "the default loss needs logits and token ids, found a dict. "
        "Define loss(output, batch) and make_batch(batch, seq)."
    )


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("SystemExit(0)", "SystemExit: 0"),
        ("GeneratorExit", "GeneratorExit"),
        ("BaseException('bang')", "BaseException: bang"),
    ],
)
def test_a_model_that_ends_the_program(end: str, words: str, tmp_path: Path) -> None:
    assert message_of(tmp_path, f"raise {end}") == (
        f"my-model cannot be traced: {words} (FILE:13: raise {end}). Check that the model runs on "
        "token ids of the length that is asked (--seq), or define make_batch(batch, seq)."
    )


def test_ctrl_c_while_tracing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        message_of(tmp_path, "raise KeyboardInterrupt")
