"""Every way to name a model wrongly, with the exact answer."""

import json
from pathlib import Path

import pytest

from mist.errors import ModelError
from mist.plans.workload import Attention, Precision
from mist.trace import TraceSetting, load_graph
from mist.trace.models.presets import PRESETS
from mist.trace.models.source import ConfigSource, PythonSource, resolve

NO_MODEL = "x = 1\n"
NOT_CALLABLE = "build_model = 3\n"
RETURNS_DICT = "def build_model():\n    return {'a': 1}\n"
RAISES = "def build_model():\n    layers = 0\n    return 1 // layers\n"
BREAKS_ON_IMPORT = "import torch\nimport no_such_module\n"
BROKEN_SYNTAX = "def build_model(:\n"


def load(source: Path | str) -> None:
    setting = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH)
    load_graph(str(source), setting, progress=lambda message: None)


def message_of(source: Path | str) -> str:
    with pytest.raises(ModelError) as error:
        load(source)
    return str(error.value)


def file_with(folder: Path, text: str, name: str = "my_model.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_preset() -> None:
    assert resolve("llama3-8b") == ConfigSource(
        label="preset llama3-8b", name="llama3-8b", config=PRESETS["llama3-8b"]
    )


def test_name_of_a_file_is_its_stem(tmp_path: Path) -> None:
    source = resolve(str(file_with(tmp_path, NO_MODEL)))
    assert isinstance(source, PythonSource)
    assert source.name == "my-model"


def test_name_of_a_config_is_its_own_or_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "Tiny-Llama"
    folder.mkdir()
    file_with(folder, json.dumps({"model_type": "llama"}), "config.json")
    assert resolve(str(folder)).name == "tiny-llama"
    named = {"model_type": "llama", "_name_or_path": "org/Other"}
    file_with(folder, json.dumps(named), "config.json")
    assert resolve(str(folder / "config.json")).name == "other"


def test_unknown_name() -> None:
    assert message_of("lama3-8b") == (
        "model 'lama3-8b' is neither a file, a folder with a config.json, nor a preset. "
        "Did you mean llama3-8b or llama3-70b or llama3-405b?"
    )


def test_wrong_kind_of_file(tmp_path: Path) -> None:
    path = file_with(tmp_path, "", "weights.bin")
    assert message_of(path) == (
        f"model '{path}' is a .bin file. Give a Python file with build_model(), a Hugging Face "
        "config.json, or a preset: bert-large, deepseek-v3, falcon-7b, gemma2-9b, gpt-neox-20b, "
        "gpt2-xl, gpt3-175b, llama3-405b, llama3-70b, llama3-8b, mixtral-8x7b, opt-6.7b, "
        "phi3-mini, qwen3-30b-a3b, qwen3-8b, t5-large, vit-large."
    )


def test_folder_without_config(tmp_path: Path) -> None:
    assert message_of(tmp_path) == (
        f"folder '{tmp_path}' holds no config.json. "
        "Give the folder of a Hugging Face model, or a Python file with build_model()."
    )


def test_broken_json(tmp_path: Path) -> None:
    path = file_with(tmp_path, "{", "config.json")
    assert message_of(path) == (
        f"{path} is not valid JSON: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)."
    )


def test_config_without_model_type(tmp_path: Path) -> None:
    path = file_with(tmp_path, '{"hidden_size": 64}', "config.json")
    assert message_of(path) == (
        f"{path} has no model_type, so it is not a Hugging Face model configuration. "
        'Add for example "model_type": "llama".'
    )


def test_config_with_unknown_model_type(tmp_path: Path) -> None:
    path = file_with(tmp_path, '{"model_type": "lama4x"}', "config.json")
    assert message_of(path) == (
        f"{path} has model_type 'lama4x', which transformers does not know. "
        "Did you mean llama4 or llama or llama4_text?"
    )


def test_config_that_transformers_refuses(tmp_path: Path) -> None:
    path = file_with(tmp_path, '{"model_type": "llama", "num_attention_heads": 3}', "config.json")
    found = message_of(path)
    start = f"transformers cannot build a model from {path}: StrictDataclassClassValidationError: "
    assert found.startswith(start)


def test_config_of_an_unknown_class(tmp_path: Path) -> None:
    text = '{"model_type": "llama", "architectures": ["LlamaForEverything"]}'
    path = file_with(tmp_path, text, "config.json")
    assert message_of(path) == (
        f"{path}: transformers has no class LlamaForEverything for model_type 'llama'. Name one of "
        "its classes in `architectures` (LlamaForCausalLM, LlamaModel), or give a Python file with "
        "build_model()."
    )


def test_config_of_a_model_whose_input_is_unknown(tmp_path: Path) -> None:
    text = '{"model_type": "moonshine"}'
    path = file_with(tmp_path, text, "config.json")
    assert message_of(path) == (
        f"{path}: MoonshineForConditionalGeneration takes input_values, which Mist cannot make up. "
        "Give a Python file with build_model() and make_batch(batch, seq)."
    )


def test_file_without_model(tmp_path: Path) -> None:
    path = file_with(tmp_path, NO_MODEL)
    assert message_of(path) == (
        f"{path} defines neither build_model() nor model. "
        "Add a function build_model() that returns the torch.nn.Module to plan."
    )


def test_build_model_is_no_function(tmp_path: Path) -> None:
    path = file_with(tmp_path, NOT_CALLABLE)
    assert message_of(path) == (
        f"{path}: build_model is an int, not a function that returns a torch.nn.Module."
    )


def test_build_model_returns_something_else(tmp_path: Path) -> None:
    path = file_with(tmp_path, RETURNS_DICT)
    assert message_of(path) == (
        f"{path}: build_model() returned a dict, not a torch.nn.Module. Return the module itself."
    )


def test_build_model_raises(tmp_path: Path) -> None:
    path = file_with(tmp_path, RAISES)
    assert message_of(path) == (
        f"{path}: build_model() raised ZeroDivisionError: integer division or modulo by zero "
        "(line 3: return 1 // layers)."
    )


def test_file_raises_on_import(tmp_path: Path) -> None:
    path = file_with(tmp_path, BREAKS_ON_IMPORT)
    assert message_of(path) == (
        f"{path} cannot be imported: ModuleNotFoundError: No module named 'no_such_module' "
        "(line 2: import no_such_module)."
    )


def test_file_with_broken_syntax(tmp_path: Path) -> None:
    path = file_with(tmp_path, BROKEN_SYNTAX)
    assert message_of(path) == (
        f"{path} cannot be imported: SyntaxError: invalid syntax (my_model.py, line 1) (line 1)."
    )


ENDS = [
    ("class Boom(BaseException): pass", "raise Boom('bang')", "Boom: bang"),
    ("", "raise SystemExit(3)", "SystemExit: 3"),
    ("", "raise GeneratorExit", "GeneratorExit"),
    ("class Mute(Exception): __str__ = None", "raise Mute('bang')", "Mute"),
]


@pytest.mark.parametrize(("defined", "raising", "words"), ENDS)
def test_whatever_a_file_raises_is_its_own_fault(
    defined: str, raising: str, words: str, tmp_path: Path
) -> None:
    on_import = file_with(tmp_path, f"{defined}\n{raising}\n")
    assert message_of(on_import) == f"{on_import} cannot be imported: {words} (line 2: {raising})."
    text = f"{defined}\ndef build_model():\n    {raising}\n"
    in_builder = file_with(tmp_path, text)
    assert message_of(in_builder) == (
        f"{in_builder}: build_model() raised {words} (line 3: {raising})."
    )


@pytest.mark.parametrize("text", ["{}", "def build_model():\n    {}"])
def test_ctrl_c_in_a_file_stays_ctrl_c(text: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        load(file_with(tmp_path, text.format("raise KeyboardInterrupt\n")))
