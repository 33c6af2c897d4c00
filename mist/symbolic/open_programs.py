"""Programs of a model with figures of its runtime left open, filled in as text.

Figures of a runtime are printed into the programs of a model, and printing takes seconds. Here each
is a symbol while a program is printed, and a number in its text afterwards.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import sympy

from mist.model.graph import ModelGraph
from mist.symbolic.compile import compile_model
from mist.symbolic.cost_setting import CostSetting
from mist.symbolic.program import ModelPrograms, Program


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPrograms:
    """Programs where names stand for some figures of the runtime.

    `symbols`: the names, by the figure's path as in a calibration ("runtime.host.step_s").
    """

    programs: ModelPrograms
    symbols: Mapping[str, str]

    def at(self, values: Mapping[str, float]) -> ModelPrograms:
        """The programs with these figures, by path; others are left aside."""
        numbers = {self.symbols[path]: repr(float(values[path])) for path in self.symbols}
        parts: dict[str, Any] = {
            item.name: _filled(part, numbers)
            for item in fields(self.programs)
            if isinstance(part := getattr(self.programs, item.name), Program)
        }
        return replace(self.programs, **parts)


def open_programs(graph: ModelGraph, setting: CostSetting, paths: Sequence[str]) -> OpenPrograms:
    """The programs of a model under a setting, with the figures of those paths left open."""
    symbols = {path: f"open_{i}" for i, path in enumerate(paths)}
    runtime = setting.runtime
    for path, name in symbols.items():
        runtime = _with_symbol(runtime, path.split(".")[1:], name)
    return OpenPrograms(
        programs=compile_model(graph, replace(setting, runtime=runtime)), symbols=symbols
    )


def _with_symbol(record: Any, names: list[str], symbol: str) -> Any:  # noqa: ANN401 - any record
    name, *rest = names
    known = getattr(record, name)
    if rest:
        return replace(record, **{name: _with_symbol(known, rest, symbol)})
    quantity = replace(known)
    # A quantity checks that it is a number, which a symbol is not yet.
    object.__setattr__(quantity, "value", sympy.Symbol(symbol, positive=True))
    return replace(record, **{name: quantity})


def _filled(program: Program, numbers: Mapping[str, str]) -> Program:
    inputs = tuple(name for name in program.inputs if name not in numbers)
    _, body = program.source.split("\n", 1)
    body = re.sub(r"\bopen_\d+\b", lambda found: numbers[found[0]], body)
    return Program(
        inputs=inputs,
        outputs=program.outputs,
        source=f"def program({', '.join(inputs)}):\n{body}",
    )
