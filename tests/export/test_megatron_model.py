"""Options of Megatron-LM for the model: where each number of a configuration goes."""

from typing import Any

import pytest

from mist.export.megatron_model import model_lines, unsaid_of_model

# As transformers 5 saves Llama 3.1, and as its authors published it.
SECTION = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0}
NEWER: dict[str, Any] = {"rope_parameters": SECTION}
OLDER: dict[str, Any] = {"rope_theta": 500000.0, "rope_scaling": SECTION}
PLAIN = ["--rotary-base 500000"]
SCALED = [*PLAIN, "--use-rope-scaling ", "--rope-scaling-factor 8.0"]


def lines(config: dict[str, Any]) -> list[str]:
    return [f"{line.option} {line.value}" for line in model_lines(config)]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_theta": 500000.0}, PLAIN),
        ({"rope_theta": 500000.0, "rope_scaling": None}, PLAIN),
        (NEWER, SCALED),
        (OLDER, SCALED),
        ({}, []),
    ],
)
def test_rotary_positions(config: dict[str, Any], expected: list[str]) -> None:
    assert [line for line in lines(config) if "ro" in line.split()[0]] == expected


def test_sizes_and_the_norm_of_a_gated_model() -> None:
    config = {"hidden_size": 64, "rms_norm_eps": 1e-6, "model_type": "qwen3", "head_dim": 16}
    found = lines(config)
    for line in ("--hidden-size 64", "--norm-epsilon 1e-06", "--swiglu ", "--kv-channels 16"):
        assert line in found


def test_positions_that_no_option_says_are_the_users() -> None:
    (words,) = unsaid_of_model({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})
    assert words == "rope_type yarn: the options of Megatron for it are yours to add"
    assert not list(unsaid_of_model(NEWER))
