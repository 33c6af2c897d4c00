"""This torch has what Mist uses of it that is not public; what is missing is refused by name."""

from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from pkgutil import walk_packages

import pytest

import mist
from mist.errors import ModelError
from mist.exec.build import torch_versions
from mist.exec.build.torch_versions import ALL, HOOKS, Hook, missing, refuse_missing
from tests.exec.layouts import plan_of
from tests.exec.running import variant_of

OF_TRITON = {"mist.layers.triton_kernels"}  # which torch brings along for CUDA only


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.name)
def test_torch_has_it(hook: Hook) -> None:
    """Of versions before that of `make` features may be missing, but not what all need."""
    if hook.feature != ALL and version("torch") < "2.13":
        pytest.skip(f"{hook.feature} came with torch {hook.since}")
    assert hook.is_here, f"{hook.module}.{hook.name} is gone: see where {hook.feature} uses it"


def test_every_module_can_be_imported() -> None:
    found = {module.name for module in walk_packages(mist.__path__, "mist.")}
    assert found >= OF_TRITON
    for name in sorted(found if find_spec("triton") else found - OF_TRITON):
        import_module(name)


def test_what_stood_in_its_place_before_will_do() -> None:
    gone = replace(HOOKS[0], name="Nothing.of_this_name")
    assert not gone.is_here
    assert replace(gone, before=HOOKS[0].name).is_here


@pytest.mark.parametrize("name", ["pp2 zero-bubble", "pp2 interleaved"])
def test_a_feature_without_its_hook_is_refused_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = Hook(module="torch", name="of_no_version", feature="zero-bubble", since="9.9")
    monkeypatch.setattr(torch_versions, "HOOKS", (*HOOKS, absent))
    assert absent in missing()
    plan = plan_of(variant_of(name), tmp_path)
    if "zero-bubble" not in name:
        refuse_missing(plan)
        return
    with pytest.raises(ModelError, match=r"has no torch.of_no_version, which zero-bubble needs"):
        refuse_missing(plan)
