"""Questions about a hand-made model: no file, no trace, no torch."""

from functools import cache

import pytest

from mist.graph import ModelGraph
from mist.spec import Precision
from mist.symbolic.compile import compile_model
from mist.symbolic.program import ModelPrograms
from mist.workflow import planning, question
from mist.workflow.question import Question
from tests.toys import toy_platform


@cache
def programs(graph: ModelGraph) -> ModelPrograms:
    """The compiled costs of a graph under runtime torch in bf16, once for all tests."""
    return compile_model(graph, toy_platform().runtime, Precision.BF16)


def answer_with(graph: ModelGraph, patch: pytest.MonkeyPatch) -> list[object]:
    """From now on every model is this graph. Returns the models asked for, as they come."""
    asked: list[object] = []

    def compiled(question: Question, *_: object) -> ModelPrograms:
        asked.append(question.model)
        return programs(graph)

    for module in (question, planning):
        patch.setattr(module, "compiled", compiled)
    return asked
