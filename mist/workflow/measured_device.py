"""From readings of one device to its profile: tables as measured, laws fitted to them.

Where a table prices an operation its law only carries on beyond the table's borders.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import exp, log
from statistics import fmean, median
from typing import Final

import numpy as np

from mist.calibrate.fit import Range, fitted, of_names, prior_of
from mist.exec.profiling import Readings
from mist.exec.profiling.readings import Reading
from mist.model.summary import Traffic
from mist.plans.workload import Precision
from mist.platform import Device, Kind, Quantity
from mist.platform.device import AttentionLaw, BandwidthRatios, FlashAttention, GemmLaw
from mist.platform.op_tables import AXES, OpTable, TabledOp, Tables
from mist.units import MICROSECOND

ATTENTION: Final = (TabledOp.ATTENTION_FORWARD, TabledOp.ATTENTION_BACKWARD)


def device_of(readings: Readings, name: str, cluster: str, kernels: str) -> Device:
    """The profile of the device that was measured."""
    held = {name: float(readings.about[name]) for name in ("bytes", "own_bytes")}
    hbm = max(_rate(row) for row in _memory_rows(readings))
    tiny = next(readings.of("kernel"))
    gemm = {precision: gemm_law(readings, precision, hbm) for precision in Precision}
    attention = _attention_precision(readings)
    peak = gemm[attention].peak_flop_per_s.value
    return Device(
        schema="mist.device/1",
        name=name,
        what=str(readings.about["name"]),
        default_cluster=cluster,
        memory_bytes=figure(held["bytes"], "what the system reports, for each rank"),
        context_bytes=figure(held["own_bytes"], "what a rank holds before it has tensors"),
        hbm_bytes_per_s=figure(hbm, "the fastest memory-bound kernel"),
        kernel_launch_s=quantity(tiny, tiny.seconds / tiny.sizes["kernels"], "tiny kernels"),
        host_to_device_bytes_per_s=_copy(readings, "host_to_device"),
        device_to_host_bytes_per_s=_copy(readings, "device_to_host"),
        tensor_time_scale=figure(1.0, "tables are of this machine, all ranks at work"),
        bandwidth_ratio=_bandwidths(readings, hbm),
        gemm=gemm,
        gemm_fp8=None,
        flash_attention=_flash(readings, attention, peak),
        tables=_tables(readings),
        kernels="cuda" if kernels == "cuda" else "cpu",
    )


def figure(value: float, words: str) -> Quantity:
    """A measured number; four digits are more than it can mean."""
    source = f"mist profile: {words}"
    return Quantity(value=float(f"{value:.4g}"), source=source, kind=Kind.MEASURED)


def quantity(row: Reading, value: float, words: str) -> Quantity:
    """A number from one reading, with its spread."""
    return figure(value, f"{words}, {spread([row])}")


def spread(rows: Sequence[Reading]) -> str:
    """How many samples, and how far they lie apart."""
    middle, worst = (100 * pick(row.spread_ratio for row in rows) for pick in (median, max))
    several = f" (median of {len(rows)} sizes, at most {worst:.0f} %)" if len(rows) > 1 else ""
    counts = min(row.count for row in rows)
    return f"median of {counts} or more, middle half within {middle:.0f} %{several}"


def _memory_rows(readings: Readings) -> list[Reading]:
    return [row for traffic in Traffic for row in readings.of(f"memory {traffic}")]


def _rate(row: Reading) -> float:
    return row.sizes["bytes"] / row.seconds


def _geometric_mean(values: Iterable[float]) -> float:
    return exp(fmean(log(value) for value in values))


def _bandwidths(readings: Readings, hbm: float) -> BandwidthRatios:
    ratios = {}
    for traffic in Traffic:
        rows = list(readings.of(f"memory {traffic}"))
        value = _geometric_mean(map(_rate, rows)) / hbm
        ratios[traffic.value] = figure(value, f"mean over kernels and sizes, {spread(rows)}")
    return BandwidthRatios(**ratios)


def _copy(readings: Readings, op: str) -> Quantity:
    row = next(readings.of(op))
    return quantity(row, _rate(row), "one copy")


def gemm_law(readings: Readings, precision: Precision, hbm: float) -> GemmLaw:
    """The law that fits a precision's products best: e, b, t0 and p of `platform.op_times`."""
    rows = list(readings.of(f"gemm {precision}"))
    m, n, k, seconds = (
        np.array([row.sizes[name] for row in rows]) if name else np.array([r.seconds for r in rows])
        for name in ("m", "n", "k", "")
    )
    flop, moved = 2 * m * n * k, precision.num_bytes * (m * k + k * n + m * n)
    peak = float((flop / seconds).max())

    def errors(values: Mapping[str, float]) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
        compute = flop / (values["efficiency"] * peak)
        memory = moved / (values["bandwidth"] * hbm)
        sharp = values["exponent"]
        bend = (compute**sharp + memory**sharp) ** (1 / sharp)
        # Logarithms, so that short and long products weigh alike.
        return np.asarray(np.log((values["launch"] + bend) / seconds))

    ranges = {
        "efficiency": Range(start=0.8, least=0.2, most=1.0),
        "bandwidth": Range(start=1.0, least=0.05, most=10.0),
        "launch": Range(start=5e-6, least=1e-7, most=1e-3),
        "exponent": Range(start=1.5, least=0.7, most=6.0),
    }
    fit = fitted(of_names(errors, tuple(ranges)), prior_of(ranges))
    found = fit.values
    words = (
        f"fitted to {len(rows)} products, median error {100 * np.median(abs(fit.errors)):.0f} %; "
    )
    words += spread(rows)
    return GemmLaw(
        peak_flop_per_s=figure(peak, f"the fastest product; {spread(rows)}"),
        efficiency_ratio=figure(found["efficiency"], words),
        bandwidth_scale=figure(found["bandwidth"], words),
        launch_s=figure(found["launch"], words),
        exponent=figure(found["exponent"], words),
    )


def _attention_precision(readings: Readings) -> Precision:
    """The precision in which attention was measured: that of training on this kind of device."""
    return next(p for p in Precision if any(readings.of(f"{ATTENTION[0]} {p}")))


def _flash(readings: Readings, precision: Precision, peak: float) -> FlashAttention:
    """Laws through the two longest sequences of each head size.

    t = t0 + F (1 + s0 / s) / (e peak): the rate F / t at two lengths gives e and s0.
    """
    forward, backward = (list(readings.of(f"{op} {precision}")) for op in ATTENTION)
    heads = sorted({row.sizes["head_dim"] for row in forward})
    least = min(row.sizes["seq"] for row in forward)
    ratios = {
        row.sizes["seq"]: back.seconds / row.seconds
        for row, back in zip(forward, backward, strict=True)
    }
    long_, short = sorted(ratios)[-1], sorted(ratios)[-2]
    ramp = max((ratios[short] - ratios[long_]) / (1 / short - 1 / long_), 0.0)
    full = next(readings.of(f"attention_full {precision}"))
    words = f"causal attention, {spread(forward)}"
    laws = tuple(_law([r for r in forward if r.sizes["head_dim"] == d], peak) for d in heads)
    masked_s = forward[-1].seconds
    tokens = laws[-1].half_rate_tokens.value
    wanted = (full.seconds / (2 * masked_s) * (1 + tokens / long_) - 1) * long_
    return FlashAttention(
        kernel="torch's own for this device",
        laws=laws,
        full_mask_ramp_ratio=figure(max(wanted / tokens, 0.0) if tokens else 0.0, words),
        backward_ratio=figure(max(ratios[long_] - ramp / long_, 0.1), words),
        backward_ramp_tokens=figure(ramp, words),
        backward_min_tokens=figure(least, words),
    )


def _law(rows: Sequence[Reading], peak: float) -> AttentionLaw:
    """Rows of one head size, the last ones of the most sequences and the longest of them."""
    most = [row for row in rows if row.sizes["sequences"] == rows[-1].sizes["sequences"]]
    short, long_ = most[-2:]
    slowness = [row.seconds / _attention_flop(row) for row in (short, long_)]
    per_token = (slowness[0] - slowness[1]) / (1 / short.sizes["seq"] - 1 / long_.sizes["seq"])
    per_token = max(per_token, 0.0)
    flat = slowness[1] - per_token / long_.sizes["seq"]
    words = f"causal attention, {spread(rows)}"
    return AttentionLaw(
        head_dim=int(rows[0].sizes["head_dim"]),
        efficiency_ratio=figure(1 / (flat * peak), words),
        half_rate_tokens=figure(per_token / flat, words),
        launch_s=figure(min(row.seconds for row in rows) / 2, words),
    )


def _attention_flop(row: Reading) -> float:
    """Of the forward pass with a causal mask."""
    return 2.0 * row.sizes["sequences"] * row.sizes["seq"] ** 2 * row.sizes["head_dim"]


def _tables(readings: Readings) -> Tables:
    tables: dict[TabledOp, dict[Precision, OpTable]] = {}
    for op in TabledOp:
        for precision in Precision:
            rows = list(readings.of(f"{op} {precision}"))
            if rows:
                tables.setdefault(op, {})[precision] = _table(op, rows)
    return tables


def _table(op: TabledOp, rows: Sequence[Reading]) -> OpTable:
    names = AXES[op].names
    return OpTable(
        columns=(*names, "us"),
        rows=tuple(
            (*(row.sizes[name] for name in names), float(f"{row.seconds / MICROSECOND:.4g}"))
            for row in rows
        ),
        source=f"mist profile: {spread(rows)}",
        kind=Kind.MEASURED,
        own=True,
    )
