"""Images in texts: how many tokens they take, where those stand, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from mist.errors import InputError, ModelError
from mist.plans.workload import Attention
from mist.trace.models.image_inputs import placed
from mist.trace.models.loader import LoadedModel, load_model
from mist.trace.models.source import resolve
from mist.workflow.request import Question, prepare
from tests.tiny_families import CONFIGS, write_family


def loaded(name: str, folder: Path, images: int | None = None) -> LoadedModel:
    source = resolve(str(write_family(name, folder)))
    return load_model(source, attention=Attention.FLASH, images=images)


# Images of 32 x 32 pixels: 16 patches of 8 x 8, or 64 of 4 x 4; what merges takes 4 for a token.
TOKENS = {"smolvlm": 4, "qwen2.5-vl": 16, "gemma3-vl": 4, "paligemma": 16, "mllama": 0}


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_of_an_image(name: str, tmp_path: Path) -> None:
    assert loaded(name, tmp_path).images == 1
    assert loaded(name, tmp_path).image_tokens == TOKENS[name]
    assert loaded(name, tmp_path, images=2).image_tokens == 2 * TOKENS[name]
    assert loaded(name, tmp_path, images=0).image_tokens == 0


@pytest.mark.slow
def test_images_are_counted_in_the_precision_of_the_model(tmp_path: Path) -> None:
    """GOT-OCR2 casts no pixels: 8 x 8 patches, merged by two convolutions of stride 2."""
    text = {key: CONFIGS["qwen2"][key] for key in CONFIGS["qwen2"]}
    vision = {"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "mlp_dim": 64}
    vision |= {"num_attention_heads": 4, "image_size": 64, "patch_size": 8, "window_size": 4}
    model = {"model_type": "got_ocr2", "architectures": ["GotOcr2ForConditionalGeneration"]}
    model |= {"text_config": text, "vision_config": vision | {"global_attn_indexes": [1]}}
    path = tmp_path / "got.json"
    path.write_text(json.dumps(model | {"image_token_id": 250}))
    known = load_model(resolve(str(path)), attention=Attention.FLASH, images=None)
    assert known.image_tokens == 4


def test_images_come_first_and_nowhere_else(tmp_path: Path) -> None:
    model, token = loaded("qwen2.5-vl", tmp_path), CONFIGS["qwen2.5-vl"]["image_token_id"]
    ids = torch.full((2, 20), token)
    batch = placed(model.module, model.batch(2, 20), ids, 1)  # type: ignore[arg-type]
    assert (batch["input_ids"] == token).tolist() == [[True] * 16 + [False] * 4] * 2
    assert batch["mm_token_type_ids"].tolist() == [[1] * 16 + [0] * 4] * 2
    assert batch["image_grid_thw"].tolist() == [[1, 8, 8]] * 2
    assert batch["pixel_values"].shape == (2 * 64, 3 * 2 * 4 * 4)


def test_a_text_model_has_no_images(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as refusal:
        loaded("llama", tmp_path, images=1)
    assert str(refusal.value) == (
        f"--images 1: {tmp_path / 'llama.json'} gives no model of texts that looks at images. "
        "Leave it out; what a file's make_batch(batch, seq) returns is taken as it is."
    )


@pytest.mark.slow
def test_a_sequence_holds_its_images(tmp_path: Path) -> None:
    model = str(write_family("smolvlm", tmp_path))
    question = Question(model=model, num_gpus=1, gpu="h100-sxm", seq_len=8, images=2)
    with pytest.raises(InputError) as refusal:
        prepare(question)
    assert str(refusal.value) == (
        "--seq 8: 2 image(s) of a sample of smolvlm take 8 tokens, and a text one at least. "
        "Try --seq 9 or more, or fewer --images (0: text only)."
    )
