"""The trace that a question asks for follows the runtime."""

from pathlib import Path

import pytest

from mist.model.graph import ModelGraph
from mist.symbolic import load_programs as programs
from mist.trace import TraceSetting
from mist.workflow.request import Question, compiled
from tests.fast_cases import first_fast
from tests.toys import toy_graph

TORCH = Path(__file__).parents[2] / "profiles/runtimes/torch.yaml"


@pytest.mark.parametrize("fused", first_fast([True, False]))
def test_the_runtime_says_which_norms_run(
    fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: list[TraceSetting] = []

    def load_graph(source: str, setting: TraceSetting, **_: object) -> ModelGraph:
        settings.append(setting)
        return toy_graph()

    monkeypatch.setattr(programs, "opened", lambda source: source)
    monkeypatch.setattr(programs, "load_graph", load_graph)
    monkeypatch.setattr(programs, "trace_digest", lambda *_: None)
    profile = tmp_path / "mine.yaml"
    text = TORCH.read_text().replace("fused_norms: false", f"fused_norms: {str(fused).lower()}")
    profile.write_text(text.replace("name: torch", "name: mine"))
    compiled(Question(model="toy.py", num_gpus=8, runtime=str(profile)))
    assert [setting.fused_norms for setting in settings] == [fused]
