"""Logs, tables of runs and arrays of tokens that somebody else wrote are data."""

import json
from pathlib import Path

import numpy as np
import pytest

from mist.errors import InputError
from mist.exec.build.batches import Batches, read_tokens
from mist.exec.build.empty_weights import load
from mist.plans.file import save_plan
from mist.plans.workload import Attention
from tests.exec.layouts import S, Variant, plan_of, write_models
from tests.sample_plans import sample_plan
from tests.security.canary import Bomb, expression, pickled, statement, went_off
from tests.test_cli import Mist, mist

__all__ = ["mist"]  # a fixture: it runs a command in an empty folder, which is the current one


@pytest.mark.parametrize("place", ["seconds", "stages", "note", "whole"])
def test_a_log_runs_no_code(mist: Mist, tmp_path: Path, place: str) -> None:
    canary = tmp_path / "canary"
    save_plan(sample_plan(), tmp_path / "plan.yaml")
    step: dict[str, object] = {"step": 1, "seconds": 1.0}
    log: dict[str, object] = {"steps": [step] * 3}
    code = expression(canary)
    if place == "seconds":
        step["seconds"] = code
    else:
        log[place] = code
    text = statement(canary).encode() if place == "whole" else json.dumps(log).encode()
    for content in (text, pickled(canary)):
        (tmp_path / "log.json").write_bytes(content)
        mist("compare", "plan.yaml", "log.json")
        mist("calibrate", "plan.yaml", "log.json", "--out", "c.yaml")
    assert not went_off(canary)


def test_a_table_of_runs_names_no_model_that_runs(mist: Mist, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(statement(canary))
    columns = "run_id,source,arch,hidden,n_layers,n_heads,ffn_hidden,vocab,seq_len,gpu,n_gpus"
    rows = [f"1,a,{arch},64,2,4,256,100,64,h100-sxm,8" for arch in ("evil.py", "./evil", "evil")]
    rows.append(f'"{expression(canary)}",' + ",".join([f'"{expression(canary)}"'] * 10))
    (tmp_path / "runs.csv").write_text("\n".join([columns, *rows]) + "\n")
    mist("validate", "runs.csv")
    assert not went_off(canary)


@pytest.mark.parametrize("how", ["an array of objects", "a pickle"])
def test_tokens_run_no_code(tmp_path: Path, how: str) -> None:
    canary, file = tmp_path / "canary", tmp_path / "tokens.npy"
    if how == "a pickle":
        file.write_bytes(pickled(canary))
    else:
        np.save(file, np.array([Bomb(canary)], dtype=object), allow_pickle=True)
    write_models(tmp_path)
    plan = plan_of(Variant(name="one", model="plain.py", stages=(S(),)), tmp_path)
    loaded = load(plan.model.source, Attention.FLASH)
    with pytest.raises(InputError, match=r"tokens\.npy cannot be read"):
        read_tokens(file, loaded, plan.workload)
    assert not went_off(canary)
    np.load(file, allow_pickle=True)
    assert went_off(canary), "the bomb is none, so that this test shows nothing"


def test_what_is_no_text_is_no_tokens(tmp_path: Path) -> None:
    """Archives and dumps of other tools would train on their own bytes without a word."""
    write_models(tmp_path)
    plan = plan_of(Variant(name="one", model="plain.py", stages=(S(),)), tmp_path)
    loaded = load(plan.model.source, Attention.FLASH)
    text = tmp_path / "text.txt"
    text.write_bytes("a few words, \u00e9 \u0663\n".encode() * 1000)
    assert len(read_tokens(text, loaded, plan.workload)) == text.stat().st_size
    np.savez(tmp_path / "tokens.npz", np.arange(5000))
    np.arange(5000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    (tmp_path / "text16.txt").write_text("words " * 1000, encoding="utf-16")
    for name in ("tokens.npz", "train.bin", "text16.txt"):
        with pytest.raises(InputError, match=f"{name} holds zero bytes, so it is no text"):
            read_tokens(tmp_path / name, loaded, plan.workload)


@pytest.mark.parametrize("token", [-1, 10**6])
def test_tokens_lie_in_the_vocabulary(tmp_path: Path, token: int) -> None:
    write_models(tmp_path)
    plan = plan_of(Variant(name="one", model="plain.py", stages=(S(),)), tmp_path)
    loaded = load(plan.model.source, Attention.FLASH)
    np.save(tmp_path / "tokens.npy", np.array([1] * 5000 + [token]))
    with pytest.raises(InputError, match=f"has token {token}, but the vocabulary of"):
        Batches(loaded, plan.workload, 7, tmp_path / "tokens.npy")
