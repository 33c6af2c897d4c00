"""Work that no input goes through, done once for all cases: it would be most of their time.

The good model is traced once for each setting, a graph is compiled once for each runtime, and the
commands are laid out once. What reads an input runs for every case.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from unittest.mock import patch

if TYPE_CHECKING:
    import typer
    from sympy import Basic, Symbol

    from mist.model.graph import ModelGraph
    from mist.symbolic.cost_setting import CostSetting
    from mist.symbolic.program import ModelPrograms, Program
    from mist.trace.model_trace import Traced
    from mist.trace.models.loader import LoadedModel
    from mist.trace.models.source import TraceSetting

GOOD_MODEL = "mist_model_tiny"  # the module that tiny.py becomes; no case changes that file


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedWork:
    """Results by what they were made of."""

    traces: dict["TraceSetting", "Traced"] = field(default_factory=dict)
    programs: dict[str, list[tuple[object, "ModelPrograms"]]] = field(default_factory=dict)
    printed: dict[object, "Program"] = field(default_factory=dict)
    commands: dict[int, object] = field(default_factory=dict)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within: commands take these results, and add those that they make."""
        import typer.main

        from mist.symbolic import compile as compiling
        from mist.trace import model_trace

        with (
            patch.object(model_trace, "trace", self._traced(model_trace.trace)),
            patch.object(compiling, "compile_model", self._compiled(compiling.compile_model)),
            patch.object(compiling, "print_program", self._printed(compiling.print_program)),
            patch.object(typer.main, "get_command", self._command(typer.main.get_command)),
        ):
            yield

    def _traced(self, trace: "Callable[..., Traced]") -> "Callable[..., Traced]":
        def traced(
            model: "LoadedModel", setting: "TraceSetting", progress: Callable[[str], None]
        ) -> "Traced":
            if type(model.module).__module__ != GOOD_MODEL:
                return trace(model, setting, progress)
            if setting not in self.traces:
                self.traces[setting] = trace(model, setting, progress)
            return self.traces[setting]

        return traced

    def _compiled(
        self, compile_model: "Callable[..., ModelPrograms]"
    ) -> "Callable[..., ModelPrograms]":
        def compiled(
            graph: "ModelGraph",
            setting: "CostSetting",
            *again: object,
        ) -> "ModelPrograms":
            # By its words: 1 and True are equal, and a case may be about just that.
            known = self.programs.setdefault(repr(setting), [])
            blocks = (graph, *again)
            for other, programs in known:
                if other == blocks:
                    return programs
            programs = compile_model(graph, setting, *again)
            known.append((blocks, programs))
            return programs

        return compiled

    def _printed(self, print_program: "Callable[..., Program]") -> "Callable[..., Program]":
        def printed(inputs: "Sequence[Symbol]", outputs: "Mapping[str, Basic]") -> "Program":
            # The formulas of a stage are the same ones for models of as many kinds of layers.
            asked = (tuple(inputs), tuple(outputs.items()))
            if asked not in self.printed:
                self.printed[asked] = print_program(inputs, outputs)
            return self.printed[asked]

        return printed

    def _command(self, get_command: Callable[["typer.Typer"], object]) -> object:
        def command(app: "typer.Typer") -> object:
            if id(app) not in self.commands:
                self.commands[id(app)] = get_command(app)
            return self.commands[id(app)]

        return command
