"""A folder with one good file of each kind, which the cases spoil: plan, log, table, cache, ..."""

import csv
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.fuzz.shared_work import SharedWork
from tests.small_models import TINY
from tests.validate.rows import RUN

SHIPPED = Path(__file__).parents[2] / "profiles"
PROFILES = ("clusters/local-cpu", "clusters/l4-box", "devices/cpu", "devices/l4", "runtimes/torch")
ASKED = ("--gpus", "2", "--seq", "32", "--global-batch", "8", "--precision", "fp32")
CONFIGS = {
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "vocab_size": 128,
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """`folder`: where commands run; `cache`: where they keep traces; `good`: copies to spoil.

    `work`: what all cases have in common.
    """

    folder: Path
    cache: Path
    good: Path
    work: SharedWork = field(default_factory=SharedWork)

    def text(self, name: str) -> str:
        return (self.good / name).read_text(encoding="utf-8")

    def restore_cache(self) -> Path:
        """The folder of cache entries, as good as at the start."""
        shutil.rmtree(self.cache, ignore_errors=True)
        shutil.copytree(self.good / "cache", self.cache)
        return self.cache / "mist" / "traces"

    def restore_checkpoints(self) -> Path:
        folder = self.folder / "checkpoints"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.good / "checkpoints", folder)
        return folder

    def restore(self) -> None:
        """Only the good files, in the folder where commands run."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for path in self.good.iterdir():
            if path.is_file():
                shutil.copy(path, self.folder)


@contextmanager
def within(workspace: Workspace) -> Iterator[None]:
    """Commands run in the folder, with its cache and without the user's profiles."""
    before, known = Path.cwd(), dict(os.environ)
    os.environ["XDG_CACHE_HOME"] = str(workspace.cache)
    os.environ["XDG_CONFIG_HOME"] = str(workspace.good / "none")
    try:
        os.chdir(workspace.folder)
        with workspace.work.used():
            yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(known)


def made(root: Path) -> Workspace:
    """A workspace, made by the commands themselves: the model is planned once."""
    workspace = Workspace(folder=root / "here", cache=root / "cache", good=root / "good")
    (workspace.good / "cache").mkdir(parents=True)
    workspace.folder.mkdir()
    workspace.cache.mkdir()
    (workspace.good / "tiny.py").write_text(TINY)
    for name in PROFILES:
        shutil.copy(SHIPPED / f"{name}.yaml", workspace.good)
    (workspace.good / "tiny.log.json").write_text(json.dumps(_log(), indent=1))
    with (workspace.good / "runs.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, list(asdict(RUN)))
        rows.writeheader()
        rows.writerows([asdict(RUN), {**asdict(RUN), "run_id": "two", "dp": 2, "tp": 4}])
    _plan(workspace)
    shutil.copytree(workspace.cache, workspace.good / "cache", dirs_exist_ok=True)
    _checkpoint(workspace)
    workspace.restore()
    return workspace


def _plan(workspace: Workspace) -> None:
    from mist.cli import main

    shutil.copy(workspace.good / "tiny.py", workspace.folder)
    asked = [*ASKED, "--cluster", "local-cpu", "--space", "3d", "--solver", "dp"]
    with within(workspace), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        for argv in (
            ["plan", "tiny.py", *asked, "--out", "tiny.yaml"],
            ["check", "tiny.py", *ASKED, "--gpu", "l4"],
        ):
            sys.argv = ["mist", *argv]
            try:
                main()
            except SystemExit as end:
                assert end.code == 0, argv
    shutil.copy(workspace.folder / "tiny.yaml", workspace.good)


def _log() -> dict[str, object]:
    parts = {"forward_s": 0.2, "backward_s": 0.4, "sums_s": 0.01, "optimizer_s": 0.05}
    steps = [{"step": i + 1, "loss": 5.0, "seconds": 0.7, "stages": [parts]} for i in range(6)]
    collective = {"axis": "dp", "kind": "all_reduce", "count": 4, "bytes": 4096}
    return {"steps": steps, "stages": [{"peak_bytes": 10**7, "collectives": [collective]}]}


STATE_NAMES = ("model.w", "first.w", "second.w")


def _checkpoint(workspace: Workspace) -> None:
    import torch
    import torch.distributed.checkpoint as dcp

    from mist.plans.file import load_plan

    plan = load_plan(workspace.good / "tiny.yaml")
    folder = workspace.good / "checkpoints" / "step-1"
    state = {name: torch.arange(6.0).reshape(2, 3) for name in STATE_NAMES}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    facts = {"fingerprint": plan.model.fingerprint, "seed": 7, "step": 1, "order": 1}
    (folder / "mist.json").write_text(json.dumps(facts))
