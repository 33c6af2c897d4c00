"""What commands share: the application, and where output goes."""

import io
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import typer
from typer.core import TyperCommand

from mist.errors import OutputError, printable

if TYPE_CHECKING:
    from typer._click.core import Context, Parameter
    from typer._click.formatting import HelpFormatter

app = typer.Typer(
    name="mist",
    help="Plan how to train a PyTorch model on a cluster: "
    "parallelism, memory and schedule together.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


# Types as people name them, not as Python does.
TYPE_WORDS: Final = {
    "<list[str]>": "<text>",  # given once for each
    "<str>": "<text>",
    "<int>": "<number>",
    "<float>": "<number>",
}


class GroupedHelp(TyperCommand):
    """A command whose help has its options in groups, and whose short help is never cut."""

    def collect_usage_pieces(self, ctx: "Context") -> list[str]:
        """The arguments by the names that their help has."""
        arguments = [p for p in self.get_params(ctx) if p.param_type_name == "argument"]
        return [self.options_metavar or "", *map(argument_name, arguments)]

    def format_options(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        """A section for the arguments and for each group of options, in the order of the code."""
        groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for parameter in self.get_params(ctx):
            is_argument = parameter.param_type_name == "argument"
            default = "Arguments" if is_argument else "Options"
            group = getattr(parameter, "rich_help_panel", None) or default
            if (record := parameter.get_help_record(ctx)) is not None:
                term, words = record
                for name, said in TYPE_WORDS.items():
                    term = term.replace(name, said)
                groups[group].append((argument_name(parameter) if is_argument else term, words))
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)

    def format_epilog(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        """The example on a line of its own, so that it can be copied."""
        formatter.write(f"\nExample:\n  {self.epilog}\n")

    def get_short_help_str(self, limit: int = 45) -> str:
        """The first sentence, whole, whatever `limit` is."""
        return super().get_short_help_str(max(limit, 1000))


def argument_name(argument: "Parameter") -> str:
    """In capitals; in brackets where it may be left out."""
    name = (argument.metavar or argument.name or "").upper().strip("[]")
    return name if argument.required else f"[{name}]"


def command(example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command; its help ends with `example`, as it is typed."""
    return app.command(cls=GroupedHelp, epilog=example)


def typed_options(context: typer.Context) -> dict[str, Any]:
    """The options and arguments that the user gave, by name."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {
        name: context.params[name]
        for name, source in sources.items()
        if source is not None and source.name == "COMMANDLINE"
    }


def progress(message: str) -> None:
    """One line on stderr, if it is open; a run does not end because nobody listens."""
    with suppress(OSError):
        print(printable(message), file=sys.stderr or io.StringIO(), flush=True)


def print_json(schema: str, data: Mapping[str, object]) -> None:
    """The result of a command with --json: JSON as its standard has it, without NaN.

    `schema`: its name in `mist.report.json_schemas`, which comes first. Raises OutputError for a
    number that JSON cannot say.
    """
    try:
        print(json.dumps({"schema": schema, **data}, indent=2, allow_nan=False))
    except ValueError as error:
        raise OutputError("--json: the result has a number that is infinite or none.") from error
