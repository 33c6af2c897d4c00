"""Files of weights: what is found beside a config.json, and what is refused by its header."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mist.errors import InputError
from mist.exec.build.pretrained import INDEX, SINGLE, check, folder_beside, tensors_of
from mist.exec.run.run_options import RunOptions
from tests.exec.layouts import LLAMA, write_models

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}


def shards(folder: Path) -> None:
    """Two files and their index."""
    for number, (name, tensor) in enumerate(TENSORS.items()):
        save_file({name: tensor}, folder / f"model-{number}.safetensors")
    places = {name: f"model-{number}.safetensors" for number, name in enumerate(TENSORS)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("write", [lambda f: save_file(TENSORS, f / SINGLE), shards])
def test_headers_say_name_type_and_shape(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path)
    found = {name: (each.dtype, each.shape) for name, each in tensors_of(tmp_path).items()}
    assert found == {"a": ("F32", (2, 3)), "b": ("BF16", (4,))}


def cut(folder: Path) -> None:
    save_file(TENSORS, folder / SINGLE)
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[:-3])


def without_a_shard(folder: Path) -> None:
    shards(folder)
    (folder / "model-1.safetensors").unlink()


def with_the_wrong_shard(folder: Path) -> None:
    shards(folder)
    save_file({"other": TENSORS["a"]}, folder / "model-1.safetensors")


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (cut, "it is cut short or damaged"),
        (written(SINGLE, b""), "is no safetensors file"),
        (written(SINGLE, b"<html>not found, a page of some length</html>"), "no safetensors file"),
        (written(SINGLE, (9).to_bytes(8, "little") + b"not json!"), "is no safetensors file"),
        (written(INDEX, b"{}"), "is no index of weights"),
        (without_a_shard, r"lacks model-1.safetensors, which model.safetensors.index.json names"),
        (with_the_wrong_shard, r"names tensors that their files do not have: b \(model-1.saf"),
        (written("pytorch_model.bin", b"x"), "has only pytorch_model.bin, which Mist does not"),
        (written("consolidated.safetensors", b"x"), "has only consolidated.safetensors, which"),
        (lambda folder: None, "has no weights"),
    ],
)
def test_what_cannot_be_read_is_refused(
    tmp_path: Path, write: Callable[[Path], None], words: str
) -> None:
    write(tmp_path)
    with pytest.raises(InputError, match=words) as error:
        check(tmp_path)
    assert str(error.value).endswith("or start from the seed with --from-scratch.")


def test_weights_count_beside_config_json_only(tmp_path: Path) -> None:
    write_models(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert folder_beside(str(tmp_path)) is None
    assert folder_beside("llama3-8b") is None  # a preset
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_text("")
    assert folder_beside(str(tmp_path)) == tmp_path  # to be refused, not to be passed over
    save_file(TENSORS, tmp_path / SINGLE)
    assert folder_beside(str(tmp_path)) == folder_beside(str(tmp_path / "config.json")) == tmp_path
    assert folder_beside(str(tmp_path / "llama.json")) is None
    assert folder_beside(str(tmp_path / "plain.py")) is None


def test_a_folder_and_the_seed_exclude_each_other() -> None:
    with pytest.raises(InputError, match="--weights and --from-scratch exclude each other"):
        RunOptions(plan="plan.yaml", weights="folder", from_scratch=True)
