"""The golden plans: `python -m tests.golden` writes them anew, tests/test_golden.py compares."""

from pathlib import Path

from mist.plans.file import dump_plan
from mist.plans.search_space import DEFAULT, space_of
from mist.workflow.planning import make_plan
from mist.workflow.request import Question

ROOT = Path(__file__).resolve().parents[1]

JOBS = {
    "llama3-8b-16xh100-sxm": Question(model="examples/llama3_8b.py", num_gpus=16),
    "gpt2-xl-2xl4": Question(model="examples/gpt2_xl.py", num_gpus=2, gpu="l4"),
    "gpt2-xl-8xa100-sxm-40": Question(model="examples/gpt2_xl.py", num_gpus=8, gpu="a100-sxm-40"),
    "my-transformer-64xh100-sxm": Question(model="examples/my_transformer.py", num_gpus=64),
}


def golden(name: str) -> str:
    """The text of a golden plan, planned now; the working directory must be the checkout."""
    return dump_plan(make_plan(JOBS[name], space_of(DEFAULT)).plan)


def path_of(name: str) -> Path:
    return ROOT / "plans" / f"{name}.yaml"


if __name__ == "__main__":
    for job in JOBS:
        path_of(job).write_text(golden(job))
        print(f"wrote {path_of(job).relative_to(ROOT)}")
