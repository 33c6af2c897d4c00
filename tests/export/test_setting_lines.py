"""Where a file says what a message is about."""

import pytest

from mist.export.setting_lines import line_of, options_in, settings_words

JSON = """{
  "zero_optimization": {
    "offload_param": {"device": "cpu"},
    "offload_optimizer": {
      "device": "none"
    }
  },
  "device": 1
}"""


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        # The section, then its key: neither the key of another section, nor one at the top.
        ("zero_optimization.offload_param.device", JSON, 3),
        ("zero_optimization.offload_optimizer.device", JSON, 5),
        # A file of another shape has no line for the section.
        ("parallelism.degree", "f(\n  degree=4,\n)", 2),
        # The last one counts, a comment does not.
        ("--size", "--size 1\n--size 2\n# --size 3", 2),
        ("micro_batch", "x\n--micro-batch 4", 2),
        ("size", "sizes 1\nfull-size 2", None),
    ],
)
def test_the_line_of_a_setting(name: str, text: str, line: int | None) -> None:
    assert line_of(name, text) == line


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("--tp 3 * --pp 2 = 6 does not divide the 16 GPUs.", ["tp", "pp"]),
        ("tp 2 with ZeRO-3: runtime x divides tensors up to ZeRO-2 only.", ["tp", "zero"]),
        ("micro-batch 2: try --global-batch 8.", ["micro_batch", "global_batch"]),
        ("--http 3 and step 4 are no options", []),
    ],
)  # fmt: skip
def test_options_that_a_message_names(message: str, options: list[str]) -> None:
    known = ("tp", "pp", "zero", "micro_batch", "global_batch")
    assert options_in(message, known) == set(options)


def test_only_settings_that_stand_in_the_file_are_named() -> None:
    names = {"--tensor-size": "tp", "--other": "tp", "--stages": "pp"}
    assert settings_words(["tp", "pp"], names, "run\n--tensor-size 4") == "--tensor-size in line 2"
    assert settings_words(["vpp"], names, "--stages 2") == ""
