"""Files that nobody meant: one refusal each, in our words, at once and in little memory."""

import json
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from mist.calibrate.logs import read_log
from mist.documents import MOST_DEPTH, MOST_NODES, Document, parse_yaml, read_json
from mist.errors import InputError, ModelError, PlatformError
from mist.files import MOST_BYTES, is_file, is_folder, read_bytes, user_path
from mist.plans.file import dump_plan, load_plan
from mist.platform.profiles import load_cluster, load_device
from mist.trace.models.source import resolve
from mist.units import LARGEST_INTEGER, MIB
from mist.validate.measured_runs import read_runs
from tests.fuzz.mutation import BOMB
from tests.sample_plans import sample_plan

SHIPPED = Path(__file__).parents[1] / "profiles"
DIGITS = "9" * 5000
# What PyYAML's constructors raise for each is no YAMLError.
ODD_VALUES = [
    *("!!int x", "!!bool x", "!!int ''", "!!float x", "!!int +", "0b", "!!int 0x", "!!float ''"),
    *(DIGITS, f"0x{DIGITS}", "!!timestamp x", "!!null x: 1", "!!python/name:os.system"),
]
DEEP = ["[" * 500 + "]" * 500, "[" * 100_000, '{"a": ' * 50_000]
Refused = Callable[[str], str]


def refusal_of(read: Callable[[], object], kind: type[InputError] = InputError) -> str:
    """What is said; the refusal takes under a second and 200 MiB."""
    begin = time.process_time()
    tracemalloc.start()
    with pytest.raises(kind) as refused:
        read()
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 200 * MIB
    assert time.process_time() - begin < 5  # one second, that tracing memory makes five
    return str(refused.value)


@pytest.mark.parametrize("value", ODD_VALUES)
def test_a_value_that_a_constructor_chokes_on(value: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    text = dump_plan(sample_plan()).replace("seq_len: 2048", f"seq_len: {value}")
    assert value in text
    path.write_text(text)
    assert str(path) in refusal_of(lambda: load_plan(path))
    path.write_text(f"schema: mist.device/1\nname: {value}\n")
    assert str(path) in refusal_of(lambda: load_device(str(path)), PlatformError)


def test_a_date_that_is_none_is_text_in_a_profile(tmp_path: Path) -> None:
    document = parse_yaml(b"a: 2020-13-45\nb: 2020-01-01", tmp_path)
    assert isinstance(document, Document)
    assert document.data == {"a": "2020-13-45", "b": "2020-01-01"}


@pytest.mark.parametrize("text", DEEP, ids=["list", "unclosed", "mapping"])
def test_deep_nesting(text: str, tmp_path: Path) -> None:
    for name, read in READERS.items():
        path = tmp_path / name
        path.write_text(f"x: {text}" if name.endswith(".yaml") else text)
        assert str(path) in refusal_of(lambda path=path, read=read: read(path))  # type: ignore[misc]


READERS: dict[str, Callable[[Path], object]] = {
    "plan.yaml": load_plan,
    "profile.yaml": lambda path: load_cluster(str(path)),
    "log.json": read_log,
    "config.json": lambda path: resolve(str(path)),
}


def test_the_deepest_document_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[" * MOST_DEPTH + "]" * MOST_DEPTH)
    assert read_json(path)
    path.write_text("[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1))
    assert "nested too deeply" in refusal_of(lambda: read_json(path))


def test_aliases_that_stand_for_billions_of_values(tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text(BOMB)
    assert f"stands for more than {MOST_NODES:,} values" in refusal_of(lambda: load_plan(path))
    assert "stands for more" in refusal_of(lambda: load_device(str(path)), PlatformError)
    merges = "b0: &b0 {a: 1}\n" + "".join(
        f"b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}'] * 10)}]}}\n" for i in range(1, 9)
    )
    path.write_text(merges)
    assert "stands for more" in refusal_of(lambda: load_plan(path))


def test_a_few_aliases_are_what_profiles_are_made_of(tmp_path: Path) -> None:
    document = parse_yaml(b"a: &a [1, 2]\nb: *a\nc: [*a, *a]", tmp_path)
    assert isinstance(document, Document)
    assert document.data["c"] == [[1, 2], [1, 2]]


@pytest.mark.slow
def test_millions_of_values(tmp_path: Path) -> None:
    path = tmp_path / "long.yaml"
    path.write_text("x: [" + "1," * 1_500_000 + "]")
    assert "stands for more" in refusal_of(lambda: load_plan(path))


def test_files_beyond_any_size(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    assert "has more than 64 MiB" in refusal_of(lambda: load_plan(path))
    path.write_bytes(b"x: " + b"y" * 5 * MIB)
    assert "has more than 4 MiB" in refusal_of(lambda: load_plan(path))


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (Path("/dev/zero"), pipe, tmp_path):
        assert "it is no file" in refusal_of(lambda path=path: read_bytes(path))  # type: ignore[misc]


@pytest.mark.parametrize("number", [LARGEST_INTEGER + 1, -LARGEST_INTEGER - 2, 10**400])
def test_whole_numbers_beyond_64_bits(number: int, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(f'{{"a": [{number}]}}')
    assert "a[0] is a number beyond 64 bits" in refusal_of(lambda: read_json(path))
    path.write_text(f'{{"a": {LARGEST_INTEGER}}}')
    assert read_json(path) == {"a": LARGEST_INTEGER}


@pytest.mark.parametrize("word", ["NaN", "Infinity", "1e400"])
def test_numbers_that_are_none(word: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(f'{{"a": {word}}}')
    assert "no finite number" in refusal_of(lambda: read_json(path))


def test_half_of_a_surrogate_pair(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": "\\ud800"}')
    assert "half of a surrogate pair" in refusal_of(lambda: read_json(path))


def test_keys_are_text(tmp_path: Path) -> None:
    for text in (b"1: 2", b"yes: 1", b"a: {~: 1}"):
        assert "is no text" in refusal_of(lambda text=text: parse_yaml(text, tmp_path))  # type: ignore[misc]


def test_a_profile_with_a_key_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("schema: mist.device/1\nname: a\nname: b\n")
    assert str(path) + " gives name twice." == refusal_of(lambda: load_device(str(path)))


def test_names_that_the_system_does_not_take() -> None:
    for name in ("x" * 5000, "a/" + "x" * 300, "a\0b", "~nobody-of-that-name/x"):
        assert not is_file(name)
        assert not is_folder(name)
        assert not is_file(user_path(name))
        refusal_of(lambda name=name: resolve(name), ModelError)  # type: ignore[misc]
        refusal_of(lambda name=name: resolve(f"{name}.py"), ModelError)  # type: ignore[misc]
        refusal_of(lambda name=name: load_device(name), PlatformError)  # type: ignore[misc]
        refusal_of(lambda name=name: load_cluster(f"{name}.yaml"), PlatformError)  # type: ignore[misc]
        refusal_of(lambda name=name: load_plan(name))  # type: ignore[misc]


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    """In one line: a list of all its keys, and of all that are missing, would help nobody."""
    plan, device = tmp_path / "plan.yaml", SHIPPED / "devices" / "l4.yaml"
    plan.write_text(dump_plan(sample_plan()))
    assert refusal_of(lambda: load_plan(device)) == (
        f"{device} is the file of a device (mist.device/1), where that of a plan (mist.plan/1) is "
        "asked for."
    )
    assert refusal_of(lambda: load_device(str(plan)), PlatformError) == (
        f"{plan} is the file of a plan (mist.plan/1), where that of a device (mist.device/1) is "
        "asked for."
    )
    assert "that of a cluster" in refusal_of(lambda: load_cluster(str(device)), PlatformError)
    plan.write_text(dump_plan(sample_plan()).replace("mist.plan/1", "mist.plan/9"))
    assert "schema: input should be 'mist.plan/1'" in refusal_of(lambda: load_plan(plan))


MARK = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    for name, text, read in (
        ("runs.csv", "run_id,source,n_layers\na,here,4\n", read_runs),
        ("log.json", '{"steps": [{"seconds": 1.5}]}', read_log),
        ("config.json", '{"model_type": "gpt2"}', lambda path: resolve(str(path)).content),
        ("plan.yaml", dump_plan(sample_plan()), load_plan),
    ):
        path = tmp_path / name
        path.write_text(text)
        plain = read(path)  # type: ignore[operator]
        path.write_bytes(MARK + text.encode())
        assert read(path) == plain  # type: ignore[operator]


STEPS = {"steps": [{"seconds": 1.5}]}
BAD_LOGS: list[tuple[object, str]] = [
    ({"steps": [{"seconds": 5e-324}]}, "has no steps with seconds above 0"),
    ({"steps": [{"seconds": 1e300}]}, "1e+300 seconds"),
    ({"steps": [{"seconds": True}]}, "is no log of a run"),
    ({**STEPS, "stages": [{"peak_bytes": 0}]}, "0 where 1 is the least"),
    ({**STEPS, "stages": [{"peak_bytes": 1.5}]}, "is no log of a run"),
    (
        {
            **STEPS,
            "stages": [
                {"peak_bytes": 1, "collectives": [{"axis": 1, "kind": 2, "count": -1, "bytes": 1}]}
            ],
        },
        "-1 where 0 is the least",
    ),
]


@pytest.mark.parametrize(("log", "words"), BAD_LOGS)
def test_logs_of_no_run(log: object, words: str, tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text(json.dumps(log))
    assert words in refusal_of(lambda: read_log(path))


@pytest.mark.parametrize("number", ["inf", "1e400", "nan", "-1", "1e16", "2.5", DIGITS])
def test_tables_with_numbers_that_no_run_has(number: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(f"run_id,source,n_layers\na,here,{number}\n")
    assert "line 2: n_layers" in refusal_of(lambda: read_runs(path))


def test_a_measured_time_of_next_to_nothing_is_none(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("run_id,source,step_time_s\na,here,5e-324\n")
    assert "line 2: step_time_s" in refusal_of(lambda: read_runs(path))


@pytest.mark.parametrize(
    "changes",
    [
        ("step_s: 5.0", "step_s: 0"),
        ("step_s: 5.0", "step_s: 5.0e-324"),
        ("{compute: ", "{'1': 8, compute: "),
        ("{states: ", "{'1': 8, states: "),
        ("num_gpus: 8", "num_gpus: 1000000000000"),
        ("seq_len: 2048", "seq_len: 1000000000000"),
        ("{none: 7, full: 1}", "{none: 1000000000, full: 1}"),
    ],
)
def test_plans_that_nothing_can_be_done_with(changes: tuple[str, str], tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    text = dump_plan(sample_plan())
    assert changes[0] in text
    path.write_text(text.replace(*changes))
    assert f"{path} has " in refusal_of(lambda: load_plan(path))
