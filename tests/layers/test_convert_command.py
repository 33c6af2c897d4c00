"""`mist convert`: what it prints, and what it refuses."""

import json
import sys

import pytest

from mist import cli


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """The exit code, and what is on stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["mist", "convert", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


@pytest.mark.slow  # a mixture of experts takes a while to build
def test_changes_and_reasons_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(monkeypatch, capsys, "mixtral-8x7b", "--level", "drop-norm")
    assert code == 0
    rows = [line.split(maxsplit=2) for line in out.splitlines() if ".layers.*." in line]
    found = {name: (count, words.strip()) for name, count, words in rows}
    assert found["model.layers.*.input_layernorm"] == (
        "32",
        "RMSNorm that rounds before it scales, made again",
    )
    assert found["model.layers.*.mlp.experts"] == (
        "32",
        "MixtralExperts has several matrices in one parameter",
    )


def test_tools_get_every_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run(monkeypatch, capsys, "gpt2-xl", "--level", "tempo", "--masks", "bit", "--json")
    found = json.loads(out)
    assert found["left_alone"] == []
    becomes = {each["module"]: each["becomes"] for each in found["changes"]}
    assert becomes["transformer.h.47.mlp.act"] == "gelu-tanh, from its result"
    assert becomes["transformer.h.47.mlp.dropout"] == "dropout, keeps a bit an element"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--level", "half"),
            "mist: level 'half' is unknown. Known: drop-activation, drop-norm, fused, norm-output, "
            "tempo.",
        ),
        (
            ("--level", "sdpa-only"),
            "mist: level sdpa-only converts no layer: it is how layers run again. `mist check "
            "gpt2-xl --checkpoint sdpa-only` judges it, `mist plan --set checkpoint=sdpa-only` "
            "plans with it.",
        ),
        (
            ("--level", "tempo", "--masks", "nibble"),
            "mist: --masks nibble is neither byte nor bit.",
        ),
    ],
)
def test_bad_options_are_refused(
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = run(monkeypatch, capsys, "gpt2-xl", *arguments)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == message
