"""`--resume`: the run goes on as if it had not been interrupted, and says what is different."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mist.calibrate.logs import read_log
from mist.errors import InputError
from mist.exec.build.batches import Batches
from mist.exec.build.empty_weights import load
from mist.exec.run.run_log import RunLog, steps_of
from mist.plans.file import load_plan, save_plan
from mist.plans.workload import Attention
from tests.exec.layouts import BATCH, GPT2, SEQ_LEN, S, Variant, plan_of, write_models
from tests.exec.test_apply import LIMIT_S, plan_file, start
from tests.security.canary import pickled, went_off

DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.3)
TWO = Variant(name="two", model="dropout.json", stages=(S(dp=2, zero=2),), micro=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("resume")
    write_models(path)
    (path / "dropout.json").write_text(json.dumps({**GPT2, **DROPOUT}))
    np.save(path / "tokens.npy", np.random.default_rng(3).integers(0, 256, 100_000))
    return path


def apply(folder: Path, *arguments: object) -> tuple[int, str]:
    """The exit code of `mist apply`, and what it printed to stderr."""
    run = start(*arguments, folder=folder)
    _, errors = run.communicate(timeout=LIMIT_S)
    return run.returncode, errors


def steps(log: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(log.read_text())["steps"]
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "empty", "gone", "code"])
def test_a_damaged_checkpoint_is_refused_in_one_line(folder: Path, how: str) -> None:
    plan, saved = plan_file(TWO, folder), folder / f"damaged-{how}"
    code, errors = apply(folder, plan, "--steps", 1, "--checkpoint", saved)
    assert code == 0, errors
    file = next((saved / "step-1").glob("*.distcp"))
    if how == "gone":
        file.unlink()
    elif how == "code":
        (saved / "step-1" / ".metadata").write_bytes(pickled(folder / "canary"))
    else:
        file.write_bytes(file.read_bytes()[:1000] if how == "cut" else b"")
    code, errors = apply(folder, plan, "--steps", 2, "--resume", "--checkpoint", saved)
    assert code == 2, errors
    assert f"mist: {saved / 'step-1'} cannot be read (" in errors
    assert "Traceback" not in errors
    assert (saved / "step-1").exists()
    assert not went_off(folder / "canary")


@pytest.mark.slow
def test_a_resumed_run_is_the_run_that_was_not_interrupted(folder: Path) -> None:
    plan, log, saved = plan_file(TWO, folder), folder / "log.json", folder / "ck"
    common = ("--data", "tokens.npy", "--log", log, "--checkpoint", saved)
    code, errors = apply(folder, plan, "--steps", 4, "--every", 2, *common)
    assert code == 0, errors
    whole = steps(log)
    shutil.rmtree(saved / "step-4")
    log.write_text(json.dumps({"steps": whole[:3]}))  # it had gone on after its checkpoint

    code, errors = apply(folder, plan, "--steps", 4, *common)
    assert code == 2
    assert f"mist: --checkpoint {saved} holds the run that wrote step-2. Go on from it" in errors
    assert not (saved / "step-4").exists()

    code, errors = apply(folder, plan, "--steps", 4, "--resume", *common)
    assert code == 0, errors
    assert f"weights: of {saved / 'step-2'}; resumed after step 2\n" in errors
    again = steps(log)
    assert again[:2] == whole[:2]
    kept = ("step", "loss", "norm")
    assert [[row[k] for k in kept] for row in again] == [[row[k] for k in kept] for row in whole]
    assert len(read_log(log).seconds) == 1  # the watched step is left out, and those before
    facts = json.loads((saved / "step-4" / "mist.json").read_text())
    assert facts["tokens"] == 4 * BATCH * SEQ_LEN

    before = log.read_text()
    code, errors = apply(folder, plan, "--steps", 4, "--resume", *common)
    assert code == 0
    assert f"already at step 4 of 4 ({saved / 'step-4'}): nothing to do\n" in errors
    assert log.read_text() == before

    full = load_plan(plan)
    workload = replace(full.workload, global_batch=8)
    save_plan(replace(full, workload=workload, num_micro_batches=1), folder / "half.yaml")
    new = folder / "new.json"
    options = ("--lr", "1e-4", "--data", "tokens.npy", "--log", new, "--checkpoint", saved)
    code, errors = apply(folder, "half.yaml", "--steps", 5, "--resume", *options)
    assert code == 0, errors
    words = "resumed after step 4; lr was 0.0003, is 0.0001; global_batch was 16, is 8\n"
    assert words in errors
    facts = json.loads((saved / "step-5" / "mist.json").read_text())
    assert facts["tokens"] == (4 * BATCH + 8) * SEQ_LEN
    assert [row["step"] for row in steps(new)] == [5]


def test_another_batch_size_neither_skips_nor_repeats_tokens(folder: Path) -> None:
    plan = plan_of(TWO, folder)
    loaded = load(plan.model.source, Attention.FLASH)
    batches = Batches(loaded, plan.workload, 7, folder / "tokens.npy")
    read = [batches.step(number)["input_ids"].flatten() for number in range(3)]  # type: ignore[index]
    workload = replace(plan.workload, global_batch=6, seq_len=20)
    after = Batches(loaded, workload, 7, folder / "tokens.npy")
    after.go_on(3, batches.position(3))
    read += [after.step(number)["input_ids"].flatten() for number in (3, 4)]  # type: ignore[index]
    tokens = np.load(folder / "tokens.npy")
    assert np.concatenate(read).tolist() == tokens[: sum(map(len, read))].tolist()
    assert after.position(5) == sum(map(len, read))


def test_a_log_keeps_the_steps_that_are_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    rows = [{"step": n, "seconds": 1.0, "stages": [{}, {}]} for n in (1, 2, 3)]
    path.write_text(json.dumps({"steps": rows}))
    log = RunLog(path=path, about={})
    log.go_on(2)
    log.step({"step": 3, "loss": 1.0, "norm": 1.0, "lr": 1.0, "seconds": 9.0}, 1, measured=False)
    assert [(row["step"], row["seconds"]) for row in steps(path)] == [(1, 1), (2, 1), (3, 9)]
    assert read_log(path).seconds == (9.0,)  # two stages then, none now


def test_another_file_is_not_taken_for_a_log(tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text("[1, 2]")
    with pytest.raises(InputError, match=r"--log .*notes.json is no log of a run"):
        steps_of(tmp_path / "notes.json")
    assert steps_of(tmp_path / "new.json") == []
