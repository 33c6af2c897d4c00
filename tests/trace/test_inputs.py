"""What a model is fed when it brings no batch: by its head, its signature and its configuration."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mist.errors import ModelError
from mist.model.graph import ModelGraph
from mist.plans.workload import Attention, Precision
from mist.trace import ConfigSource, TraceSetting, load_graph
from mist.trace.models.configurations import model_of
from mist.trace.models.model_inputs import WAVES, default_batch
from mist.trace.tensor_parallel.tp_plan import planned_heads

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
LLAMA = SIZES | {"num_key_value_heads": 2}
VISION = SIZES | {"image_size": 32, "patch_size": 16}
CONFIGS = {
    "BertForSequenceClassification": {"model_type": "bert", **SIZES},
    "RobertaForTokenClassification": {"model_type": "roberta", **SIZES},
    "BertForQuestionAnswering": {"model_type": "bert", **SIZES},
    "BertModel": {"model_type": "bert", **SIZES},
    "LlamaForSequenceClassification": {"model_type": "llama", "num_labels": 1, **LLAMA},
    "Dinov2Model": {"model_type": "dinov2", **VISION},
    "ResNetForImageClassification": {
        "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2],
    },
    "CLIPForImageClassification": {
        "model_type": "clip", "text_config": SIZES, "vision_config": VISION,
    },
    "WhisperForConditionalGeneration": {
        "model_type": "whisper", "vocab_size": 128, "d_model": 32,
        "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "max_source_positions": 64, "max_target_positions": 32,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    },
    "Wav2Vec2ForSequenceClassification": {
        "model_type": "wav2vec2", "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 64, "conv_dim": [16, 16],
        "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    },
    "ASTForAudioClassification": {
        "model_type": "audio-spectrogram-transformer", "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 64, "max_length": 64, "num_mel_bins": 32,
    },
}  # fmt: skip


def load(config: dict[str, object]) -> ModelGraph:
    setting = TraceSetting(precision=Precision.BF16, attention=Attention.FLASH)
    source = ConfigSource(label="config.json", name="tiny", config=config)
    return load_graph(source, setting, progress=lambda message: None)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_fits_each_head(name: str) -> None:
    graph = load(CONFIGS[name] | {"architectures": [name]})
    assert graph.num_layers >= 2
    assert all(block.goes_back for block in graph.blocks)


@pytest.mark.slow
def test_an_unknown_type_is_read_as_the_architecture_that_it_names() -> None:
    graph = load(LLAMA | {"model_type": "my_llama", "architectures": ["LlamaForCausalLM"]})
    assert graph.notes == (
        "model_type 'my_llama' is not in transformers: read as 'llama', whose architecture "
        "LlamaForCausalLM it names",
    )
    assert graph.num_layers == 2


def test_no_draw_decides_what_runs() -> None:
    config = LLAMA | {"model_type": "bart", "encoder_layerdrop": 0.1, "dropout": 0.1}
    model, notes = model_of("config.json", config, Attention.FLASH)
    assert notes == ("encoder_layerdrop 0.1 is read as 0.0: all layers run, on all tokens",)
    assert model.model.encoder.layerdrop == 0.0  # type: ignore[union-attr]


def test_samples_of_sound_are_those_of_the_positions() -> None:
    sizes = SimpleNamespace(conv_kernel=(10, 3, 3, 3, 3, 2, 2), conv_stride=(5, 2, 2, 2, 2, 2, 2))
    module: Any = SimpleNamespace(
        main_input_name=WAVES, config=sizes, loss_function=None, forward=lambda input_values: None
    )
    batch: Any = default_batch(module, 2, 49, 0)
    assert batch[WAVES].shape == (2, 48 * 320 + 400)  # a window of 400 samples every 320


@pytest.mark.slow
def test_stored_weights_are_named() -> None:
    config = LLAMA | {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}
    assert load(config).notes[0].startswith("quantization_config says how weights are stored")


@pytest.mark.parametrize("named", ["LlamaForCausalLM", [5], [None], {"a": 1}, 7])
def test_architectures_are_names(named: object) -> None:
    with pytest.raises(ModelError) as refused:
        load(LLAMA | {"model_type": "llama", "architectures": named})
    assert str(refused.value) == (
        f"config.json has architectures {named!r}: expected a list of class names."
    )


@pytest.mark.slow
def test_what_libraries_warn_of_is_not_shown() -> None:
    """As `rope_scaling` is an older name; a warning is an error in these tests."""
    scaling = {"type": "linear", "factor": 2.0}
    assert load(LLAMA | {"model_type": "llama", "rope_scaling": scaling}).num_layers == 2


def test_layers_with_numbers_of_heads_of_their_own_have_no_common_limit() -> None:
    """transformers raises where a number of unlike layers is read from the configuration."""

    class Unlike:
        is_heterogeneous = True

        @property
        def num_attention_heads(self) -> int:
            raise ValueError("of which layer?")

    model = torch.nn.Module()
    model.config = Unlike()  # type: ignore[assignment]
    assert list(planned_heads(model)) == []
