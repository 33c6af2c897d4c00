"""The house rules that no linter checks: budgets, light imports, documents that hold anywhere."""

import ast
import json
import re
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from mist.plans.knobs import SEARCHED_KNOBS, STAGE_KNOBS, TYPED_KNOBS
from mist.plans.plan import StagePlan
from mist.plans.search_space import SearchSpace
from mist.workflow.api import LayoutOptions
from tests.mutants import run as mutants

ROOT = Path(__file__).parents[1]
SOURCES = [*sorted((ROOT / "mist").rglob("*.py")), ROOT / "cli.py"]

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_BRANCHES = 10

HEAVY = ("torch", "transformers", "matplotlib", "pandas", "pulp", "highspy")
# A second is what a person calls "at once"; CPU time is up to three times as long on a slow or
# busy machine.
MAX_HELP_S = 3.0
# Only these modules may load a heavy package when they are imported.
ROOMS = {
    re.compile(
        r"mist\.trace\.(?!(models(\.(source|presets))?|trace_cache|operations|recording|tensor_parallel)$).+"
    ): {"torch", "transformers"},
    re.compile(
        r"mist\.exec\.(?!(build|dryrun|run|build\.rank_grid|run\.(launch|run_options|run_log))$).+"
    ): {"torch", "transformers"},
    re.compile(r"mist\.milp\.integer_program"): {"pulp", "highspy"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """A function as the budget sees it; a nested one is counted alone and in its parent."""

    name: str
    num_lines: int
    num_branches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Help:
    """What `mist --help` printed, how long it took and the top-level packages it imported."""

    text: str
    seconds: float
    imported: frozenset[str]


def functions(source: str) -> Iterator[Function]:
    """Every function and method of a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            yield Function(name=node.name, num_lines=lines, num_branches=branches(node))


def branches(function: ast.AST) -> int:
    """Cyclomatic complexity: one, and one for each place where the path can fork."""
    return 1 + sum(_forks(node) for node in ast.walk(function))


def _forks(node: ast.AST) -> int:
    match node:
        case ast.BoolOp():
            return len(node.values) - 1
        case ast.comprehension():
            return len(node.ifs)
        case ast.If() | ast.IfExp() | ast.For() | ast.AsyncFor() | ast.While():
            return 1
        case ast.ExceptHandler() | ast.match_case():
            return 1
        case _:
            return 0


def test_branches_of_a_known_function() -> None:
    # One path; +1 for; +1 if, +1 and; +1 conditional expression; +1 comprehension's if; +1 except.
    source = """
def known(rows):
    try:
        for row in rows:
            if row and row[0]:
                return 1 if row[1] else 2
    except KeyError:
        pass
    return [row for row in rows if row]
"""
    assert list(functions(source)) == [Function(name="known", num_lines=8, num_branches=7)]


def test_no_file_is_over_500_lines() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in SOURCES}
    assert not {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > MAX_FILE_LINES}


def test_no_function_is_over_60_lines_or_10_branches() -> None:
    over = [
        f"{path.relative_to(ROOT)} {function}"
        for path in SOURCES
        for function in functions(path.read_text())
        if function.num_lines > MAX_FUNCTION_LINES or function.num_branches > MAX_BRANCHES
    ]
    assert not over, "\n".join(over)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A new interpreter in the checkout, which must succeed."""
    command = [sys.executable, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    return run


LIST_IMPORTS = """
import importlib, json, sys
found, before = {}, set(sys.modules)
for name in sys.argv[1:]:
    importlib.import_module(name)
    found[name] = sorted({module.split(".")[0] for module in set(sys.modules) - before})
    before = set(sys.modules)
print(json.dumps(found))
"""


def imports_of(*names: str) -> dict[str, set[str]]:
    """The top-level packages that each module adds when they are imported in this order."""
    found = json.loads(python("-c", LIST_IMPORTS, *names).stdout)
    return {name: set(added) for name, added in found.items()}


def module_names() -> list[str]:
    """Every module of mist, as it is imported."""
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in SOURCES[:-1]]
    return [".".join(name[:-1] if name[-1] == "__init__" else name) for name in parts]


def allowed(module: str) -> set[str]:
    """The heavy packages that a module may load."""
    return set().union(*(found for room, found in ROOMS.items() if room.fullmatch(module)))


def test_heavy_packages_are_imported_only_in_their_rooms() -> None:
    light = [name for name in module_names() if not allowed(name) and name != "mist.__main__"]
    found = {name: added & set(HEAVY) for name, added in imports_of(*light).items()}
    assert {name: heavy for name, heavy in found.items() if heavy} == {}


@pytest.fixture(scope="module")
def helps() -> list[Help]:
    """`mist --help` in three new processes."""
    return [ask_for_help() for _ in range(3)]


def cpu_seconds() -> float:
    """Of the processes that were started and have ended: others on the machine do not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def ask_for_help() -> Help:
    """One `mist --help` in a new process."""
    code = "import sys; sys.argv = ['mist', '--help']; from mist.cli import main; main()"
    start = cpu_seconds()
    run = python("-X", "importtime", "-c", code)
    seconds = cpu_seconds() - start
    imported = {line.split("|")[-1].strip().split(".")[0] for line in run.stderr.splitlines()}
    return Help(text=run.stdout, seconds=seconds, imported=frozenset(imported))


def test_help_imports_nothing_heavy(helps: list[Help]) -> None:
    assert "Usage" in helps[0].text
    assert "typer" in helps[0].imported, "the import list was not read"
    assert not helps[0].imported & {*HEAVY, "sympy"}


def test_help_answers_at_once(helps: list[Help]) -> None:
    assert min(help_.seconds for help_ in helps) < MAX_HELP_S


API = """
import sys
import mist
assert not {"numpy", "pydantic", "sympy", "torch"} & set(sys.modules), "import mist is not lazy"
import mist.plans.file, mist.workflow.api  # a module of that name would now hide a functions
for name in ("plan", "check", "load_plan", "save_plan"):
    assert callable(getattr(mist, name)), f"mist.{name} is hidden by a module of that name"
"""


def test_python_api_is_lazy_and_not_hidden_by_modules() -> None:
    python("-c", API)


MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|Users|work|mnt|tmp)/")
PUBLISHED = ["*.md", "NOTICE", "Makefile", ".ci/run", "docs/**/*.md", "examples/*", "plans/*.yaml"]


def test_no_path_of_one_machine_is_published() -> None:
    files = [path for glob in PUBLISHED for path in sorted(ROOT.glob(glob)) if path.is_file()]
    assert ROOT / "README.md" in files
    lines = [(path, line) for path in files for line in path.read_text().splitlines()]
    assert not [f"{path}: {line}" for path, line in lines if MACHINE_PATH.search(line)]


def test_source_is_ascii() -> None:
    assert not [str(path.relative_to(ROOT)) for path in SOURCES if not path.read_text().isascii()]


def test_every_mutant_still_applies() -> None:
    table = mutants.load(mutants.TABLE.read_text())
    text = {mutant.file: (ROOT / mutant.file).read_text() for mutant in table}
    tests = {test.split("::")[0] for mutant in table for test in mutant.tests}
    assert not [mutant.name for mutant in table if text[mutant.file].count(mutant.old) != 1]
    assert not [test for test in sorted(tests) if not (ROOT / test).exists()]


def test_a_name_is_of_one_class_and_of_one_module() -> None:
    classes = Counter(
        node.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    modules = Counter(
        path.parent.name if path.name == "__init__.py" else path.stem for path in SOURCES[:-1]
    )
    assert not [name for name, count in (classes + modules).items() if count > 1]


# House rule: the model code bases that we learned from have 20 to 90.
MIN_COMMENT_LINES = 15.0  # per 1,000 lines of code


def test_comments_say_why() -> None:
    lines = [line.strip() for path in SOURCES for line in path.read_text().splitlines()]
    code = [line for line in lines if line and not line.startswith("#")]
    comments = [line for line in lines if line.startswith("#")]
    assert 1000 * len(comments) / len(code) >= MIN_COMMENT_LINES


# The name of a member of a table, and how many modules may know one. Others loop over its rows.
NAMED_MEMBERS = {
    "memory levels": (r'SELECTIVE|\bFULL\b|"selective"|"full"', 7),
    "schedules": (r'\b(GPIPE|ONE_F_ONE_B|INTERLEAVED|ZERO_BUBBLE)\b|"(1f1b|zero-bubble)"', 8),
}


@pytest.mark.parametrize("idea", NAMED_MEMBERS)
def test_few_modules_name_a_member_of_a_table(idea: str) -> None:
    pattern, most = NAMED_MEMBERS[idea]
    naming = [path for path in SOURCES if re.search(pattern, path.read_text())]
    assert len(naming) <= most, naming


def listed_names(node: ast.AST) -> set[object]:
    """The names that one list, call, signature or class body puts side by side."""
    match node:
        case ast.Call(keywords=keywords):
            return {keyword.arg for keyword in keywords}
        case ast.Dict(keys=keys):
            return {key.value for key in keys if isinstance(key, ast.Constant)}
        case ast.Tuple(elts=items) | ast.List(elts=items) | ast.Set(elts=items):
            constants = {item.value for item in items if isinstance(item, ast.Constant)}
            return constants | {item.attr for item in items if isinstance(item, ast.Attribute)}
        case ast.arguments(args=args, kwonlyargs=more):
            return {each.arg for each in (*args, *more)}
        case ast.ClassDef(body=body):
            lines = [line.target for line in body if isinstance(line, ast.AnnAssign)]
            return {target.id for target in lines if isinstance(target, ast.Name)}
    return set()


def test_few_modules_list_knobs_by_hand() -> None:
    """Typed declarations of a stage, a search space and the Python API; others loop over KNOBS."""
    knobs = {"tp", "zero", "micro_batch"}
    listing = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if knobs <= listed_names(node)
    }
    assert listing <= {
        "mist/plans/plan.py",
        "mist/plans/search_space.py",
        "mist/workflow/api.py",
    }


def test_typed_declarations_have_every_knob() -> None:
    stage = {item.name for item in fields(StagePlan)}
    assert {knob.name for knob in STAGE_KNOBS} <= stage
    assert {knob.space for knob in SEARCHED_KNOBS.values()} <= {f.name for f in fields(SearchSpace)}
    assert {knob.field for knob in TYPED_KNOBS} <= set(LayoutOptions.__annotations__)
