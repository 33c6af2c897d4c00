"""Fits the law of matrix products to public tables and reports what is held out.

    pip install -e '.[silicon]'; python benchmarks/laws/fit.py

For developers. Reads the tables of NVIDIA aiconfigurator (Apache-2.0), which it finds installed or
in a folder given. Products in bf16: the law of `OpCosts.gemm_s` fitted to 70 % of the (n, k)
columns, judged on the others. Collectives in a node: every third size left out of the table that
`CollectiveLaw` interpolates.
"""

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mist.calibrate.fit import Range, fitted
from mist.plans.numerics import NUMERICS
from mist.plans.workload import Precision
from mist.platform import Cluster, Collective, Kind, OpCosts, Quantity
from mist.platform.cluster import CollectiveTable
from mist.platform.collectives import CollectiveLaw
from mist.platform.profiles import load_cluster, load_device, load_runtime

# Device, its folder, the tables of products and of NCCL that its profile was fitted to.
SYSTEMS = (
    ("a100-sxm-80", "a100_sxm", "trtllm/1.0.0", "2.27.3"),
    ("h100-sxm", "h100_sxm", "trtllm/1.3.0rc20", "2.29.2"),
    ("h200", "h200_sxm", "trtllm/1.3.0rc20", "2.29.2"),
    ("b200", "b200_sxm", "trtllm/1.3.0rc20", "2.29.2"),
    ("gb200", "gb200", "trtllm/1.3.0rc20", None),
    ("l40s", "l40s", "trtllm/1.3.0rc20", None),
)
SMALLEST, LARGE = 256, 1024
HELD_OUT = 0.3
MOST_ROWS = 2500  # of a fit
MIB = 2.0**20
CONSTANTS = {
    "efficiency_ratio": Range(start=0.75, least=0.3, most=1.0),
    "bandwidth_scale": Range(start=0.9, least=0.3, most=2.5),
    "launch_s": Range(start=3e-6, least=1e-6, most=3e-5),
    "exponent": Range(start=2.0, least=1.0, most=5.0),
}


def folder() -> Path:
    """Where the tables are. Ends with a message when they are nowhere."""
    if len(sys.argv) > 1:
        return Path(sys.argv[1])
    found = importlib.util.find_spec("aiconfigurator_core")
    if found is None or not found.submodule_search_locations:
        sys.exit("aiconfigurator_core is not installed: pip install -e '.[silicon]'")
    return Path(found.submodule_search_locations[0]) / "systems/data"


def costs(device: str, law: Mapping[str, float]) -> OpCosts:
    """Costs of a device with other constants of its law."""
    profile = load_device(device).profile
    values = {
        name: Quantity(value=value, source="fitted here", kind=Kind.FIT)
        for name, value in law.items()
    }
    gemm = {**profile.gemm, Precision.BF16: replace(profile.gemm[Precision.BF16], **values)}
    return OpCosts(
        device=replace(profile, gemm=gemm),
        cluster=load_cluster(profile.default_cluster).profile,
        runtime=load_runtime("torch").profile,
        numerics=NUMERICS["bf16"],
    )


def product_errors(rows: pd.DataFrame, law: OpCosts) -> NDArray[np.float64]:
    """log(predicted / measured) of products."""
    predicted = law.gemm_s(1, *(rows[name].to_numpy(float) for name in "mnk"))
    return np.asarray(np.log(predicted / (rows.latency.to_numpy(float) * 1e-3)))


def products(data: Path, device: str, system: str, table: str) -> None:
    rows = pd.read_parquet(data / system / "gemm" / table / "gemm_perf.parquet")
    rows = rows[(rows.gemm_dtype == "bfloat16") & (rows[list("mnk")].min(axis=1) >= SMALLEST)]
    generator = np.random.default_rng(0)
    columns = rows[["n", "k"]].drop_duplicates()
    out = columns.sample(frac=HELD_OUT, random_state=generator)
    held = rows.merge(out, on=["n", "k"])
    kept = rows.merge(columns.drop(out.index), on=["n", "k"])
    sample = kept.sample(n=min(MOST_ROWS, len(kept)), random_state=generator)
    law, _ = fitted(lambda values: product_errors(sample, costs(device, values)), CONSTANTS)
    large = held[held[list("mnk")].min(axis=1) >= LARGE]
    print(f"{device}: " + ", ".join(f"{name} {value:.4g}" for name, value in law.items()))
    for words, found in (("fitted here", costs(device, law)), ("profile", costs(device, {}))):
        print(
            f"    {words}: held out {quality(product_errors(held, found))}, "
            f"m, n, k >= {LARGE}: {quality(product_errors(large, found))} of {len(large)}"
        )


def collectives(data: Path, device: str, system: str, version: str) -> None:
    rows = pd.read_parquet(data / system / "comm/nccl" / version / "nccl_perf.parquet")
    rows = rows[rows.nccl_dtype == "half"].assign(size=2 * rows.message_size)
    cluster = load_cluster(load_device(device).profile.default_cluster).profile
    every: list[NDArray[np.float64]] = []
    for word in Collective:
        table = rows[rows.op_name == word.value].pivot_table(
            index="size", columns="num_gpus", values="latency"
        )
        held = table.iloc[2::3]
        law = CollectiveLaw.of(with_table(cluster, word, table.drop(held.index)), word)
        found = [
            np.log(law.seconds(held.index.to_numpy(float), n, n) / (held[n].to_numpy() * 1e-3))
            for n in table.columns
        ]
        large = [errors[held.index >= MIB] for errors in found]
        every += large
        print(f"    {word.value}: {quality(np.concatenate(found))}, >= 1 MiB: "
              f"{quality(np.concatenate(large))}")  # fmt: skip
    print(f"    all collectives, >= 1 MiB: {quality(np.concatenate(every))}")


def with_table(cluster: Cluster, word: Collective, table: pd.DataFrame) -> Cluster:
    """The cluster with this table, in ms, in the place of its own."""
    points = tuple(
        (float(size), *(float(ms) * 1e3 for ms in row)) for size, row in
        zip(table.index, table.to_numpy(), strict=True)
    )  # fmt: skip
    found = CollectiveTable(
        columns=("bytes", *(f"group_{n}_us" for n in table.columns)),
        rows=points,
        source="public tables",
        kind=Kind.MEASURED,
    )
    return replace(cluster, tables={**cluster.tables, word: found})


def quality(errors: NDArray[np.float64]) -> str:
    off = 100 * np.abs(np.expm1(errors))
    return f"{np.median(off):.1f} / {np.percentile(off, 90):.1f} %"


def main() -> None:
    data = folder()
    print("median / 90th percentile of the error of what was held out")
    for device, system, table, version in SYSTEMS:
        products(data, device, system, table)
        if version is not None:
            collectives(data, device, system, version)


if __name__ == "__main__":
    main()
