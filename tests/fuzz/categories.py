"""The cases, by what they spoil: each gives the words of one command, and writes the files.

Checkpoints are read as a rank reads them, in this process: see `tests.fuzz.judge`.
"""

import csv
import io
import json
import pickle
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml

from mist.files import ENTRY, digest
from tests.fuzz.mutation import (
    FLOATS,
    HUGE,
    NAMES,
    NUMBERS,
    SCALARS,
    Rng,
    copied,
    mutate,
    spoilt,
)
from tests.fuzz.workspace import ASKED, CONFIGS, Workspace
from tests.security.canary import Bomb, expression, statement

CANARY = Path("canary")
Case = Callable[[Rng, Workspace], list[str]]
Value = Callable[[Rng], str]


def _of(*values: str) -> Value:
    return lambda rng: rng.choice(values)


def _number(*sane: str) -> Value:
    return lambda rng: rng.choice(sane) if rng.random() < 0.6 else rng.choice(NUMBERS)


def _assigned(keys: tuple[str, ...], *values: str) -> Value:
    return lambda rng: f"{rng.choice(keys)}={rng.choice(values)}"


_NAME, _FLOAT = _of(*NAMES), _of(*FLOATS)
_OUT = _of(
    *("o.yaml", "o.txt", "no/o.yaml", "/proc/o.yaml", "/dev/null", ".yaml", "plans", "tiny.py"),
    *("x" * 300 + ".yaml", "\n.yaml", "", "tiny.py/o.yaml", "x" * 5000 + ".yaml", "tiny.yaml"),
)
_STATES = ("weights", "grads", "optimizer", "activations", "offload", "x", "")
_KNOBS = ("tp", "pp", "dp", "micro-batch", "zero", "vpp", "dp-replicate", "checkpoint", "x", "")
COMMON: dict[str, Value] = {
    "--gpu": _NAME,
    "--cluster": _NAME,
    "--runtime": _NAME,
    "--seq": _number("32", "64", "1"),
    "--global-batch": _number("8", "16", "64"),
    "--precision": _of("bf16", "fp32", "fp16", "", "int8"),
    "--attention": _of("flash", "math", "x"),
    "--margin": _FLOAT,
    "--host-memory": _of(
        "64GB", "1TB", "0GB", "1e9GB", "nan", HUGE + "GB", "64", "-1GB", "1e400TB"
    ),
}
PLAN = COMMON | {
    "--objective": _of("throughput", "memory", "tokens-per-dollar", "time-to-tokens", "x"),
    "--price": _FLOAT,
    "--tokens": _of(*FLOATS, "1e12", "-1e12"),
    "--space": _of("3d", "megatron", "deepspeed", "fsdp", "mist", "", "x"),
    "--set": _assigned(_KNOBS, "1", "2", "0", "-1", HUGE, "full", "gpipe", "", "1" + "0" * 30),
    "--max": _assigned((*_KNOBS, *_STATES), "1", "2", "0", "-1", HUGE, "", "a", "nan", "0.5"),
    "--forbid": _of(
        "offload", "selective", "full", "1f1b", "gpipe", "unlike-stages", "", "x", HUGE
    ),
    "--solver": _of("dp", "milp", "both", "x"),
    "--time-limit": _of("0", "0.01", "1", "-1", "nan", "inf", "1e400", "x"),
    "--top": _number("0", "1", "5"),
    "--out": _OUT,
}
CHECK = COMMON | {
    "--tp": _number("1", "2"),
    "--pp": _number("1", "2"),
    "--zero": _number("0", "1", "2", "3"),
    "--dp-replicate": _number("1", "2"),
    "--micro-batch": _number("1", "2", "4"),
    "--checkpoint": lambda rng: rng.choice([*NUMBERS, "none", "full", "selective", "1", "2"]),
    "--vpp": _number("1", "2"),
    "--layers": _of("2,2", "4", "1,3", "0,4", HUGE, "", ",", "a", "2,2,2"),
    "--schedule": _of("gpipe", "1f1b", "interleaved", "zero-bubble", "x"),
    "--offload": _assigned(_STATES, "0", "1", "0.5", "nan", "inf", "-1", "1e-320", "", "a"),
    "--out": _OUT,
}
TRACE: dict[str, Value] = {
    "--at": lambda rng: f"b={rng.choice(NUMBERS)},s={rng.choice(NUMBERS)}",
    "--capacity": _FLOAT,
    "--policy": _of("x", "cuda", ""),
    "--precision": _of("fp32"),
    "--graph": _of("x.png", "", "/proc/x.svg", "no/x.svg", "o.svg"),
}
APPLY: dict[str, Value] = {
    "--steps": _number("1"),
    "--seed": _number("7"),
    "--lr": _FLOAT,
    "--every": _number("1"),
    "--timeout": _FLOAT,
    "--data": _NAME,
    "--weights": _NAME,
    "--log": _of("tiny.yaml", "tiny.py", "no/x.json", "x" * 5000 + ".json", "l.json"),
}


def _drawn(rng: Rng, table: dict[str, Value], most: int) -> list[str]:
    names = rng.sample(sorted(table), rng.randint(0, most))
    words = [word for name in names for word in (name, table[name](rng))]
    return [*words, *(["--json"] if rng.random() < 0.4 else [])]


def options(rng: Rng, _: Workspace) -> list[str]:
    """Any command with options that are right, wrong or absurd."""
    gpus = rng.choice(["1", "2", "4"]) if rng.random() < 0.6 else rng.choice(NUMBERS)
    small = ["--gpus", gpus, *ASKED[2:]]
    kinds: list[Callable[[], list[str]]] = [
        lambda: ["check", "tiny.py", *small, *_drawn(rng, CHECK, 5)],
        lambda: ["check", "tiny.py", *small, *_drawn(rng, CHECK, 5)],
        lambda: ["plan", "tiny.py", *small, "--space", "3d", *_drawn(rng, PLAN, 4)],
        lambda: ["plan", rng.choice(NAMES), *small, *_drawn(rng, PLAN, 2)],
        lambda: ["trace", "tiny.py", *_drawn(rng, TRACE, 2), "--precision", "fp32"],
        lambda: ["profiles", *(rng.choice(NAMES) for _ in range(rng.randint(0, 3)))],
        lambda: ["apply", "tiny.yaml", *_drawn(rng, APPLY, 3)[:-1], "--lr", "-1"],
        lambda: ["compare", rng.choice(NAMES), rng.choice(NAMES)],
        lambda: ["calibrate", *(rng.choice(NAMES) for _ in range(rng.randint(0, 4)))],
        lambda: ["validate", rng.choice(NAMES), "--out", _OUT(rng)],
        lambda: ["verify", rng.choice([name for name in NAMES if "tiny.yaml" not in name])],
        lambda: ["profile", "--seconds", rng.choice(["0", "nan", "-1", "inf"]), "--out", "o.yaml"],
    ]
    return [word.replace("\0", "") for word in rng.choice(kinds)()]


def _spoilt_yaml(rng: Rng, workspace: Workspace, name: str) -> bytes:
    text = workspace.text(name)
    if rng.random() < 0.45:
        return spoilt(rng, text)
    data = copied(_parsed(text))
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        mutate(rng, data)
    # Most of JSON is YAML too, and much faster to write.
    write = json.dumps if rng.random() < 0.8 else partial(yaml.safe_dump, sort_keys=False)
    return str(write(data)).encode("utf-8", "surrogatepass")


@cache
def _parsed(text: str) -> object:
    return yaml.safe_load(text)


def plans(rng: Rng, workspace: Workspace) -> list[str]:
    """A plan file that somebody spoilt, judged or compared."""
    Path("f.yaml").write_bytes(_spoilt_yaml(rng, workspace, "tiny.yaml"))
    as_json = ["--json"] if rng.random() < 0.5 else []
    if rng.random() < 0.25:
        return ["compare", "f.yaml", "tiny.log.json", *as_json]
    return ["check", "f.yaml", *as_json, *(["--out", "g.yaml"] if rng.random() < 0.2 else [])]


def profiles(rng: Rng, workspace: Workspace) -> list[str]:
    """A profile of a device, cluster or runtime that somebody spoilt."""
    option, name, *others = rng.choice(
        [
            ("--cluster", "local-cpu", "--gpu", "cpu"),
            ("--cluster", "l4-box", "--gpu", "l4"),
            ("--gpu", "cpu", "--cluster", "local-cpu"),
            ("--gpu", "l4", "--cluster", "l4-box"),
            ("--runtime", "torch", "--cluster", "local-cpu"),
        ]
    )
    Path("p.yaml").write_bytes(_spoilt_yaml(rng, workspace, f"{name}.yaml"))
    knobs = [*("--zero", rng.choice("013")), *("--pp", rng.choice("12"))]
    as_json = ["--json"] if rng.random() < 0.6 else []
    return ["check", "tiny.py", *ASKED, *knobs, option, "./p.yaml", *others, *as_json]


def logs(rng: Rng, workspace: Workspace) -> list[str]:
    """The log of a run that somebody spoilt."""
    data = json.loads(workspace.text("tiny.log.json"))
    raw = spoilt(rng, workspace.text("tiny.log.json"), JSON_WORDS)
    if rng.random() < 0.6:
        for _ in range(rng.choice([1, 1, 2, 4])):
            mutate(rng, data)
        raw = json.dumps(data).encode()
    Path("f.json").write_bytes(raw)
    # Each calibration compiles the costs a dozen times: 17 s, where a comparison takes 0.05 s.
    if rng.random() < 0.02:
        return ["calibrate", "tiny.yaml", "f.json", "--out", "cal.yaml"]
    return ["compare", "tiny.yaml", "f.json", *(["--json"] if rng.random() < 0.5 else [])]


JSON_WORDS = (
    *("NaN,", "Infinity,", "-Infinity,", "1e400,", "5e-324,", f"{HUGE},", '"\\ud800",', "null,"),
    *("[" * 3000, "{", "0,", "-1,", '"x",', "[],", "1.5e3,", "true,", '"[/x]",', '"\\u001b[31m",'),
)


def tables(rng: Rng, workspace: Workspace) -> list[str]:
    """A CSV file of measured runs that somebody spoilt."""
    rows = list(csv.DictReader(io.StringIO(workspace.text("runs.csv"))))
    names: list[str] = list(rows[0])
    for _ in range(rng.choice([1, 1, 2, 5])):
        row = rng.choice(rows)
        row[rng.choice(names)] = rng.choice([*NUMBERS, *FLOATS, *CSV_WORDS]).replace("\0", "")
    if rng.random() < 0.15:
        names.remove(rng.choice(names))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    raw = text.getvalue().encode("utf-8", "surrogatepass")
    Path("f.csv").write_bytes(spoilt(rng, text.getvalue()) if rng.random() < 0.2 else raw)
    more = {"--json": 0.5, "--uncalibrated": 0.3}
    flags = [name for name, share in more.items() if rng.random() < share]
    return ["validate", "f.csv", *flags, *(["--out", "g.csv"] if rng.random() < 0.3 else [])]


CSV_WORDS = (
    *("ok", "oom", "crashed_flaky", "fsdp", "zero3", "none", "selective", "full", "hand", "yes"),
    *("gpt", "dense-llama", "moe", "A100-80GB-SXM", "bf16", "fp8", "fp16", "1e9", "1e15", "0.1"),
)


def configs(rng: Rng, _: Workspace) -> list[str]:
    """A config.json of Hugging Face that somebody spoilt."""
    kind = rng.choice(sorted(CONFIGS))
    data: dict[str, Any] = {"model_type": kind, **copied(CONFIGS[kind])}
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice(sorted(data))
        match rng.randrange(4):
            case 0:
                key, value = rng.choice(CONFIG_ITEMS)
                data[key] = value
            case 1:
                data[name] = copied(rng.choice(SCALARS))
            case 2:
                data[name] = rng.choice([0, -1, 3, 10**9, 10**12, "2", 2.5, None, []])
            case 3:
                del data[name]
    raw = json.dumps(data, indent=1)
    folder = Path("configuration")
    folder.mkdir(exist_ok=True)
    content = spoilt(rng, raw, JSON_WORDS) if rng.random() < 0.3 else raw.encode()
    (folder / "config.json").write_bytes(content)
    where = ("--cluster", "local-cpu", "--seq", "16", "--global-batch", "4", "--precision", "fp32")
    return ["check", rng.choice(["configuration", "configuration/config.json"]), *ASKED[:2], *where]


CONFIG_ITEMS: tuple[tuple[str, object], ...] = (
    ("trust_remote_code", True),
    ("auto_map", {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Configuration"}),
    ("attn_implementation", "evil/kernel"),
    ("_attn_implementation", "evil/kernel"),
    ("quantization_config", {"quant_method": "gptq", "bits": 4}),
    ("dtype", "x"),
    ("architectures", "LlamaForCausalLM"),
    ("architectures", ["pipeline"]),
    ("architectures", [None]),
    ("architectures", ["__file__"]),
    ("_name_or_path", "../../x"),
    ("_name_or_path", 5),
    ("_name_or_path", "/"),
    ("_name_or_path", "a\nb[/x]"),
    ("rope_scaling", {"type": "yarn"}),
    ("layer_types", ["x"]),
    ("hidden_act", "nothing"),
    ("pruned_heads", {"0": [0, 1]}),
    ("id2label", "x"),
    ("num_labels", 10**9),
    ("num_hidden_layers", 10**9),
    ("n_layer", 10**7),
    ("num_local_experts", 10**9),
    ("model_type", "bert"),
    ("model_type", ""),
    ("model_type", "LLAMA"),
    ("model_type", "clip"),
    ("model_type", "mixtral"),
    ("output_hidden_states", True),
    ("pad_token_id", 10**6),
    ("tie_word_embeddings", True),
)


def caches(rng: Rng, workspace: Workspace) -> list[str]:
    """Entries of the cache that somebody spoilt: the answer is the same as ever."""
    folder = workspace.restore_cache()
    # By what they hold: their names are digests, which differ from one folder to the next.
    names = [path.name for path in sorted(folder.iterdir(), key=lambda each: each.stat().st_size)]
    contents = {name: (folder / name).read_bytes() for name in names}
    for name in rng.sample(names, rng.choice([1, 1, 2, len(names)])):
        _spoil_entry(rng, folder / name, contents)
    return ["check", "tiny.py", *ASKED, "--cluster", "local-cpu", "--json"]


def _spoil_entry(rng: Rng, path: Path, contents: Mapping[str, bytes]) -> None:
    """Another content, or something else than a file, in place of an entry; `contents`: all."""
    names = list(contents)
    if rng.random() < 0.15:
        path.unlink()
        path.mkdir() if rng.random() < 0.5 else path.symlink_to(rng.choice(["/dev/null", path]))
        return
    raw, code = contents[path.name], rng.choice([statement(CANARY), expression(CANARY)]).encode()
    i = rng.randrange(len(raw))
    changed: list[Callable[[], bytes]] = [
        lambda: raw[:i],
        lambda: rng.randbytes(200),
        lambda: contents[rng.choice(names)],
        lambda: rng.choice([b"null", b"[]", b"{}", b"1", b"[" * 100_000, b"9" * 5000, b"", b"x"]),
        lambda: _mutated_json(rng, path.name, raw),
        lambda: _mutated_json(rng, path.name, raw),
        lambda: raw.replace(b"return", code + b"; return", 1),
        lambda: raw.replace(b"source", code, 1),
        lambda: raw[:i] + rng.randbytes(1) + raw[i + 1 :],
    ]
    path.write_bytes(rng.choice(changed)())


def _mutated_json(rng: Rng, name: str, raw: bytes) -> bytes:
    """An entry with one change, whose own digest is right again: as an attacker would write it."""
    found = ENTRY.fullmatch(raw.decode())
    if found is None:
        return raw
    data = json.loads(found[2])
    mutate(rng, data)
    text = json.dumps(data)
    return f'{{"sha256":"{digest(name, text)}","entry":{text}}}'.encode()


def checkpoints(rng: Rng, workspace: Workspace) -> list[str]:
    """A checkpoint that somebody spoilt, from which a run goes on."""
    folder = workspace.restore_checkpoints() / "step-1"
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    path = rng.choice(paths)
    raw = path.read_bytes()
    match rng.randrange(8):
        case 0:
            raw = raw[: rng.randrange(len(raw))]
        case 1 | 2:
            for _ in range(rng.randint(1, 4)):
                i = rng.randrange(len(raw))
                raw = raw[:i] + rng.randbytes(1) + raw[i + rng.randint(0, 2) :]
        case 3:
            raw = pickle.dumps(rng.choice([Bomb(CANARY), [Bomb(CANARY)], {"a": Bomb(CANARY)}]))
        case 4:
            facts = json.loads((folder / "mist.json").read_text())
            mutate(rng, facts)
            path, raw = folder / "mist.json", json.dumps(facts).encode()
        case 5:
            raw = rng.choice([b"", b"null", b"[]", b"{}", b"[" * 100_000, rng.randbytes(300)])
        case 6:
            path.unlink()
            return _resumed(rng)
        case 7:
            folder.rename(folder.with_name(rng.choice(["step-x", "step-" + "9" * 200, "step-0"])))
            return _resumed(rng)
    path.write_bytes(raw)
    return _resumed(rng)


def _resumed(rng: Rng) -> list[str]:
    log = ["--log", "tiny.log.json"] if rng.random() < 0.2 else []
    return ["apply", "tiny.yaml", "--checkpoint", "checkpoints", "--resume", "--steps", "3", *log]


CATEGORIES: dict[str, Case] = {
    case.__name__: case
    for case in (options, plans, profiles, logs, tables, configs, caches, checkpoints)
}
