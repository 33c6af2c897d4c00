"""A config.json that somebody else wrote is data: nothing that it names is fetched or run."""

import json
from pathlib import Path

import pytest

from mist.errors import ModelError
from mist.plans.workload import Attention
from mist.trace.models import configurations, loader
from mist.trace.models.configurations import NAMED_KERNELS
from mist.trace.models.source import resolve, without_kernels
from tests.exec.layouts import LLAMA
from tests.security.canary import statement, went_off


def config(tmp_path: Path, **keys: object) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA, **keys}))
    return str(path)


@pytest.mark.parametrize(
    "keys",
    [
        {"attn_implementation": "org/kernel"},
        {"_attn_implementation": "org/kernel@main:forward"},
        {"_attn_implementation_internal": "kernels-community/flash-attn3"},
        {"attn_implementation": {"": "flash_attention_2", "text_config": "org/kernel"}},
        {"attn_implementation": {"": "eager", "text_config": "org/kernel"}},
        {"text_config": {"attn_implementation": "org/kernel"}},
        {"experts_implementation": "org/experts"},
        {"use_kernels": True},
        {"kernel_config": {"RMSNorm": "org/norm"}},
        {"kernels": ["org/norm"]},
        {"parts": [{"part": {"_attn_implementation": "org/kernel"}}]},
    ],
)
def test_kernels_of_elsewhere_are_refused(tmp_path: Path, keys: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="which transformers may fetch and run"):
        resolve(config(tmp_path, **keys))


@pytest.mark.parametrize("value", ["eager", "sdpa", None])
def test_kernels_of_transformers_itself_are_none_of_that(tmp_path: Path, value: str | None) -> None:
    resolve(config(tmp_path, attn_implementation=value))


@pytest.mark.parametrize(
    "keys",
    [
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation_internal": "flash_attention_3"},
        {"_attn_implementation": {"": "flex_attention"}},
    ],
)
def test_kernels_that_published_files_name_are_left_out(
    tmp_path: Path, keys: dict[str, object]
) -> None:
    loaded = loader.load_model(resolve(config(tmp_path, **keys)), attention=Attention.FLASH)
    assert loaded.module.config._attn_implementation == "sdpa"
    assert NAMED_KERNELS in loaded.notes
    inner = {"parts": [{"part": keys}, 1]}
    assert without_kernels(inner) == {"parts": [{"part": {}}, 1]}


def test_code_beside_a_configuration_does_not_run(tmp_path: Path) -> None:
    """What `trust_remote_code` lets transformers run, by all keys that could ask for it."""
    canary = tmp_path / "canary"
    for name in ("modeling_evil", "configuration_evil"):
        (tmp_path / f"{name}.py").write_text(statement(canary))
    source = resolve(
        config(
            tmp_path,
            trust_remote_code=True,
            auto_map={
                "AutoConfig": "configuration_evil.Config",
                "AutoModelForCausalLM": "modeling_evil.Model",
            },
        )
    )
    loader.load_model(source, attention=Attention.FLASH)
    assert not went_off(canary)


def test_nothing_is_fetched_while_a_configuration_becomes_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    seen = []

    def build(label: str, known: object) -> object:
        seen.append(constants.HF_HUB_OFFLINE)
        raise ModelError("seen")

    monkeypatch.setattr(configurations, "_class_of", build)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    source = resolve(config(tmp_path))
    with pytest.raises(ModelError, match="seen"):
        loader.load_model(source, attention=Attention.FLASH)
    assert seen == [True]
    assert constants.HF_HUB_OFFLINE is False
