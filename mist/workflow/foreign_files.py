"""`mist check FILE`: a file of another framework, read as data, as a layout that is judged.

What the file says stands; what it leaves open is asked for by the option that says it. Settings
that predictions do not know are notes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mist.documents import text_of
from mist.errors import InputError
from mist.export.bridge_recipes import recipe_text
from mist.export.edits import edits_of, settings_of
from mist.export.rounding import expressible
from mist.export.setting_lines import options_in, read_lines, settings_words
from mist.export.target import Configuration, ExportSource, Target
from mist.export.targets import target_of
from mist.files import is_file, read_bytes, user_path
from mist.plans.knobs import TYPED_KNOBS
from mist.plans.plan import NOTHING_OFFLOADED, Plan
from mist.platform.overrides import SEQUENCE_SWITCH
from mist.platform.profiles import load_runtime
from mist.symbolic.load_programs import Progress, quiet
from mist.trace import ConfigSource, resolve
from mist.workflow.advice import best_instead
from mist.workflow.checking import Checked, HandLayout, check_layout
from mist.workflow.request import Question


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignFile:
    """A file of a target, as it was read."""

    path: str
    target: Target
    configuration: Configuration
    text: str


def foreign_file(name: str) -> ForeignFile | None:
    """The file of that name as one of a target, or the recipe; None where it is none.

    Raises InputError.
    """
    text = _text_of(name)
    if text is None:
        return None
    target = target_of(text)
    if target is None or target.read is None:
        return None
    said = read_lines(target.read, text, name)
    return ForeignFile(path=name, target=target, configuration=said, text=text)


def _text_of(name: str) -> str | None:
    """The text of a file; of the name of a recipe, the module that it is alone."""
    path = user_path(name)
    if not is_file(path):
        return recipe_text(name)
    try:
        return text_of(read_bytes(path), path)
    except InputError:
        return None  # whoever reads it as something else says what is wrong with it


def check_file(
    file: ForeignFile,
    question: Question,
    layout: HandLayout,
    typed: Mapping[str, Any],
    progress: Progress = quiet,
) -> Checked:
    """Judge the layout of a file.

    `question`, `layout`: of the command line. `typed`: the options that the user gave, by name.
    Raises InputError for what the file leaves open, what both say, and, with the lines of its
    settings, for what does not add up.
    """
    said = file.configuration
    if twice := [_option(name) for name in typed if name in names_said(said)]:
        does = "does" if len(twice) == 1 else "do"
        raise InputError(
            f"mist check {file.path}: the file says itself what {', '.join(twice)} {does}."
        )
    model: str | None = typed.get("model") or _model_of(file)
    _refuse_open(file, typed, model)
    try:
        question, layout = _completed(said, replace(question, model=str(model)), layout, typed)
        return _judged(file, question, layout, typed, progress)
    except InputError as error:
        raise InputError(_with_places(file, str(error))) from error


def _judged(
    file: ForeignFile,
    question: Question,
    layout: HandLayout,
    typed: Mapping[str, Any],
    progress: Progress,
) -> Checked:
    """The layout as the first runtime has it that can run it. Raises InputError without one."""
    own = file.configuration.runtimes or file.target.runtimes
    reasons: list[str] = []
    for runtime in [typed["runtime"]] if "runtime" in typed else own:
        asked = _with_sequence(file.configuration, question, layout, runtime)
        try:
            checked = check_layout(asked, layout, progress)
        except InputError as error:
            reasons.append(str(error))
            continue
        _refuse_contradiction(file, checked)
        notes = _notes(file, runtime, reasons, typed)
        return replace(
            checked,
            notes=(*checked.notes, *notes),
            suggestions=(*_in_words_of(file, checked), *best_instead(asked, checked)),
        )
    raise InputError("\n".join(dict.fromkeys(reasons)))


def _with_places(file: ForeignFile, message: str) -> str:
    """Each line of a message, with the settings of the file that it is about and their lines."""
    names = file.target.names
    lines = []
    for line in message.splitlines():
        words = settings_words(options_in(line, names.values()), names, file.text)
        place = f" ({words})" if words else ""
        lines.append(f"{file.path}: {line.removesuffix('.')}{place}.")
    return "\n".join(lines)


def _model_of(file: ForeignFile) -> str | None:
    """The model that a file names, where it is a preset, or a configuration here or beside it.

    Python of a model runs only where the user names it: of a file it is no model.
    """
    name = file.configuration.model
    for source in () if name is None else (name, str(Path(file.path).parent / name)):
        try:
            found = resolve(source)
        except InputError:
            continue
        if isinstance(found, ConfigSource):
            return source
    return None


def _completed(
    said: Configuration, question: Question, layout: HandLayout, typed: Mapping[str, Any]
) -> tuple[Question, HandLayout]:
    """The question and the layout with what a file says, and what follows from it."""
    question = replace(question, **_of_question(said))
    if said.launched and "gpus" not in typed and said.num_gpus is None:
        question = replace(question, num_gpus=said.launched)
    layout = replace(layout, **_of_layout(said))
    if "global_batch" not in typed and said.global_batch is None:
        question = replace(question, global_batch=_batch_of(said, question, layout))
    return question, layout


def _batch_of(said: Configuration, question: Question, layout: HandLayout) -> int:
    """The global batch of a file that says what each rank does of it."""
    assert said.num_micro_batches is not None, "else it was asked for"
    knobs = {name: int(getattr(layout, name)) for name in ("tp", "pp", "micro_batch")}
    ranks = max(question.num_gpus // (knobs["tp"] * knobs["pp"]), 1)
    return ranks * knobs["micro_batch"] * said.num_micro_batches


def _with_sequence(
    said: Configuration, question: Question, layout: HandLayout, runtime: str
) -> Question:
    """The question about that runtime, with tensor parallelism that shards the sequence or not."""
    question = replace(question, runtime=runtime)
    own = load_runtime(runtime).profile.knobs.sequence_parallel
    if layout.tp == 1 or said.shards_sequence in (None, own):
        return question
    switched = {SEQUENCE_SWITCH: float(not own)}
    return replace(question, overrides={**switched, **question.overrides})


def _in_words_of(file: ForeignFile, checked: Checked) -> Iterator[str]:
    """The suggestions, changed layouts in the words of the file where it has words for them."""
    if file.configuration.runtimes:  # the target's own words are of another way to divide states
        yield from checked.suggestions
        return
    can = file.target.expresses
    assert can is not None, "a launcher's script is not read"
    fitting, known = expressible(checked.plan, file.target.name, can)
    own = _settings(file, fitting)
    for remedy in checked.remedies:
        plan = replace(
            checked.plan,
            stages=tuple(remedy.made.stages),
            num_micro_batches=remedy.made.num_micro_batches,
            schedule=remedy.made.schedule,
            estimate=remedy.judged,
        )
        fitting, losses = expressible(plan, file.target.name, can)
        # What the file itself leaves unsaid is no loss of the change.
        edits: tuple[str, ...] = ()
        if set(losses) <= set(known):
            edits = edits_of(file.path, file.text, own, _settings(file, fitting))
        yield f"{'; '.join(edits)}: {remedy.gain_words}" if edits else remedy.words
    yield from checked.suggestions[len(checked.remedies) :]


def _settings(file: ForeignFile, plan: Plan) -> tuple[str, ...]:
    """What the target's own files say of a plan that it can express."""
    return settings_of(file.target.write(ExportSource(plan=plan, path=file.path, config={})))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _of_question(said: Configuration) -> dict[str, Any]:
    names = ("seq_len", "global_batch", "precision", "num_gpus")
    return {name: getattr(said, name) for name in names if getattr(said, name) is not None}


def _of_layout(said: Configuration) -> dict[str, Any]:
    found: dict[str, Any] = dict(said.knobs)
    if said.checkpoint is not None:
        found["checkpoint"] = said.checkpoint
    if said.layers:
        found["layers"] = said.layers
    if said.offload != NOTHING_OFFLOADED:
        found["offload"] = said.offload
    return found | {"schedule": said.schedule}


def names_said(said: Configuration) -> set[str]:
    """Options that the file answers, as the command line names them."""
    names = {*_of_question(said), *_of_layout(said)}
    words = {"seq_len": "seq", "num_gpus": "gpus"}
    return {words.get(name, name) for name in names}


def _refuse_open(file: ForeignFile, typed: Mapping[str, Any], model: str | None) -> None:
    """Ask for what the file does not say, and no default may stand for."""
    missing = list(_missing(file.configuration, typed, model))
    if not missing:
        return
    named = file.configuration.model
    why = f" Its model, {named}, is neither a preset nor a folder with a config.json here."
    raise InputError(
        f"mist check {file.path}: a file of {file.target.name} does not say {', '.join(missing)}. "
        f"Give {'it' if len(missing) == 1 else 'them'} too."
        f"{why if named and model is None else ''}"
    )


def _missing(said: Configuration, typed: Mapping[str, Any], model: str | None) -> Iterator[str]:
    """What is neither in the file nor on the command line."""
    known = {*names_said(said), *typed}
    if model is None:
        yield "MODEL"
    if said.num_micro_batches is not None:
        known.add("global_batch")  # it follows
    for name in ("seq", "global_batch", "micro_batch", "checkpoint"):
        if name not in known:
            yield _option(name)
    if "gpus" not in known and not said.launched:
        yield "--gpus"


def _refuse_contradiction(file: ForeignFile, checked: Checked) -> None:
    """What the file states and what follows from the rest of it are the same."""
    said, plan = file.configuration, checked.plan
    found = {
        "num_layers": (plan.num_layers, plan.model.name),
        "dp": (plan.stages[0].dp, f"{plan.cluster.num_gpus} GPUs"),
        "num_micro_batches": (plan.num_micro_batches, "the global batch"),
    }
    for name, (follows, source) in found.items():
        stated = getattr(said, name)
        if stated is not None and stated != follows:
            raise InputError(f"the file says {name} {stated}, but from {source} follows {follows}.")


def _notes(
    file: ForeignFile, runtime: str, reasons: list[str], typed: Mapping[str, Any]
) -> Iterator[str]:
    if "model" not in typed:
        yield f"MODEL is not given: {file.configuration.model} of {Path(file.path).name} is taken"
    if reasons:
        yield f"predicted as runtime {runtime}, because {reasons[0].splitlines()[0]}"
    if file.configuration.untouched:
        names = ", ".join(file.configuration.untouched)
        yield f"{Path(file.path).name}: these change neither time nor memory: {names}"
    for setting in file.configuration.unmodelled:
        yield f"{Path(file.path).name}: not modelled: {setting}"
    known = {knob.field for knob in TYPED_KNOBS}
    assert set(file.configuration.knobs) <= known
