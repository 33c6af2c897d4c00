"""Values, structures and bytes that nobody meant, drawn from a seeded generator."""

import json
import random
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

Rng = random.Random
Data: TypeAlias = Any  # nested lists and mappings of JSON, and keys of either

HUGE = "9" * 5000
NUMBERS = (
    *("0", "-1", "1", "2", "3", "7", "8", "64", "1000003", "2147483648", "1000000000", "735134400"),
    *("9223372036854775807", "9223372036854775808", "1" + "0" * 30, "1" + "0" * 400, HUGE, "+1"),
    *("nan", "inf", "-inf", "1e3", "1e400", "5e-324", "0.5", "-0.0", "0x10", "1_000", "", " "),
    *("\u0668", "\u00b2", "a", "\U0001f4a5", "2,4", "1..4", "8..2", "0..0", "1..1000000000"),
    *("4..99999999999999999999", "-3..5", "a" * 5000, "%s", "{0}", "\n", "None", "1,,2", ".."),
)
NAMES = (
    *("h100-sxm", "l4", "cpu", "local-cpu", "l4-box", "dgx-h100", "torch", "megatron", "", " "),
    *("/", "/dev/null", "/dev/zero", "/proc/self/mem", "x" * 5000, "a/" + "x" * 300, "L4", "~"),
    *("../l4", "./nothing.yaml", "tiny.py", "tiny.yaml", "./tiny.yaml", "plans", "./plans/"),
    *("~/x.yaml", "~nobody/x.yaml", "~nobody", "l4-box,local-cpu", "local-cpu,l4-box", ",", "a\tb"),
    *("\x1b[31mred", "[bold]x", "[/x]", "\u202etxt", "caf\u00e9", "\ud800", "tiny.log.json", "-"),
)
FLOATS = (
    *("0", "0.12", "0.5", "0.999999", "1", "1.0000001", "-0.1", "nan", "inf", "-inf", "1e-300"),
    *("1e300", "1e400", "5e-324", "", "a", "0.1,0.2", "2,3", "1e18", "1e30"),
)
SCALARS: tuple[object, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 8, 10**6, 10**12, 2**63 - 1, 2**63, 10**30, 10**400),
    *(0.5, -0.5, 1e308, 5e-324, 1e-30, 1e30, float("inf"), float("nan"), -0.0, "", " ", "x", "1"),
    *("x" * 5000, "\U0001f4a5", "\x07", "../../etc/passwd", "/dev/zero", "~nobody/x", "tiny.py"),
    *("object:x", "[/x]", "\ud800", "a\0b", "bf16", "zero-bubble", "interleaved", "gpipe", "full"),
    *([], {}, [[]], [0, 1], [0, 10**9], [0, -1], [0, 0], {"a": 1}, [1, 2, 3], [None], ["touch x"]),
)
YAML_WORDS = (
    *(
        "!!python/object/apply:os.system ['touch canary']",
        "!!python/name:os.system",
        "!!binary aGk=",
    ),
    *("!!python/object/new:os.system ['touch canary']", "!!set {a, b}", "!!omap [a: 1]", "!!int x"),
    *(
        "!!float x",
        "!!bool x",
        "!!timestamp 2020-13-45",
        "2020-13-45",
        "2020-01-01",
        "!!timestamp x",
    ),
    *(
        "!!int ''",
        "!!int +",
        "!!int 0x",
        "!!float ''",
        "0b",
        "1:60:60",
        "190:20:30.15",
        "0o9",
        "!x 1",
    ),
    *("!!map [1]", "!!seq {a: 1}", "!!str [1]", "? [1, 2]\n  : 3", "{[1]: 2}", "{{a: 1}: 2}", "<<"),
    *(
        "&a [*a]",
        "*nothing",
        "&a {a: *a}",
        "{<<: 1}",
        "{<<: [1]}",
        "{<<: {<<: {a: 1}}}",
        "=",
        "yes",
    ),
    *(".nan", ".inf", "1e400", "5e-324", "0", "0.0", "false", HUGE, '"\\0"', '"\\ud800"', "|\n  x"),
    *("%", "@", "`", "\t", "---", "...", "- - - -", "[" * 600 + "]" * 600, "[" * 3000, "{a: " * 90),
    "&a [&b [1,1,1,1,1,1,1,1], *b,*b,*b,*b,*b,*b], " + ", ".join("*a" for _ in range(9)),
)
BOMB = "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9) if i else '1'}]\n" for i in range(12))


def places(data: object, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in nested lists and mappings, but that of the whole."""
    items = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else ()
    )
    for key, value in items:
        yield (*at, key)
        yield from places(value, (*at, key))


def copied(value: object) -> Data:
    return json.loads(json.dumps(value))


def mutate(rng: Rng, data: Data) -> None:
    """One change somewhere in nested data; where it cannot be made, none."""
    paths = list(places(data))
    if not paths:
        return
    *steps, key = rng.choice(paths)
    holder = data
    for step in steps:
        holder = holder[step]
    rng.choice(CHANGES)(rng, holder, key, data)


def _replace(rng: Rng, holder: Data, key: Data, _: Data) -> None:
    holder[key] = copied(rng.choice(SCALARS))


def _drop(_: Rng, holder: Data, key: Data, __: Data) -> None:
    del holder[key]


def _add(rng: Rng, holder: Data, key: Data, _: Data) -> None:
    if isinstance(holder, dict):
        name = rng.choice(["x", str(key).upper(), "schema", "", "[/x]", "\ud800"])
        holder[name] = copied(rng.choice(SCALARS))


def _scale(rng: Rng, holder: Data, key: Data, _: Data) -> None:
    value = holder[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        holder[key] = rng.choice([value * 2, -value, value * 10**6, str(value), [value], 0, 5e-324])


def _reorder(rng: Rng, holder: Data, key: Data, _: Data) -> None:
    if isinstance(holder, list):
        holder.insert(key, copied(holder[key])) if rng.random() < 0.5 else holder.reverse()


def _graft(rng: Rng, holder: Data, key: Data, data: Data) -> None:
    value = data
    for step in rng.choice(list(places(data))):
        value = value[step]
    holder[key] = copied(value)


CHANGES: tuple[Callable[[Rng, Data, Data, Data], None], ...] = (
    *(_replace, _replace, _replace, _drop, _add, _scale, _reorder, _graft),
)


def spoilt(rng: Rng, text: str, words: tuple[str, ...] = YAML_WORDS) -> bytes:
    """A text with one fault in its lines, its bytes or its encoding."""
    lines = text.split("\n")
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(10):
        case 0 | 1 | 2:
            head, colon, _ = lines[i].partition(": ")
            lines[i] = f"{head}: {rng.choice(words)}" if colon else rng.choice(words)
        case 3:
            lines.insert(i, lines[j])
        case 4:
            del lines[i:]
        case 5:
            lines[i] = " " * rng.randint(0, 8) + lines[i].strip()
        case 6:
            lines[i], lines[j] = lines[j], lines[i]
        case 7:
            return _damaged(rng, text.encode("utf-8", "surrogatepass"))
        case 8:
            return _encoded(rng, text)
        case 9:
            lines.insert(i, BOMB)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _damaged(rng: Rng, raw: bytes) -> bytes:
    for _ in range(rng.randint(1, 8)):
        i = rng.randrange(len(raw) + 1)
        raw = raw[:i] + rng.randbytes(rng.randint(0, 2)) + raw[i + rng.randint(0, 20) :]
    return raw


def _encoded(rng: Rng, text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return rng.choice(
        [
            b"\xef\xbb\xbf" + raw,
            raw.replace(b"\n", b"\r\n"),
            raw.replace(b"\n", b"\r"),
            raw.decode("utf-8", "replace").encode("utf-16"),
            raw + b"\0",
            b"\0" + raw,
            b"",
            b"\n",
            b"---\n" + raw + b"\n---\n" + raw,
            raw + b"\xff",
            raw.replace(b" ", b"\t"),
            raw.replace(b" ", "\u00a0".encode()),
            b"[" * 100_000,
            b'{"a":' * 50_000,
        ]
    )
