"""Questions about a hand-made model: no file, no trace, no torch."""

import pytest

from mist.model.graph import ModelGraph
from mist.symbolic.program import ModelPrograms
from mist.workflow import cluster_choice as renting
from mist.workflow import explaining, planning
from mist.workflow import request as question
from mist.workflow.request import Question
from tests.toys import toy_programs


def answer_with(graph: ModelGraph, patch: pytest.MonkeyPatch) -> list[object]:
    """From now on every model is this graph. Returns the models asked for, as they come."""
    asked: list[object] = []

    def compiled(question: Question, *_: object, **__: object) -> ModelPrograms:
        asked.append(question.model)
        return toy_programs(graph, question.runtime, more=tuple(question.levels))

    for module in (question, planning, renting, explaining):
        patch.setattr(module, "compiled", compiled)
    return asked
