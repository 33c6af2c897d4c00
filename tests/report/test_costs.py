"""The cost tables: expressions, their values at a point, and every figure of every profile."""

from dataclasses import replace

import pytest
import sympy

from mist.model.graph import B
from mist.platform.listing import figure_rows, profile_rows
from mist.report.costs import outside_trace, print_profiles, print_trace, profiles_json, trace_json
from tests.toys import toy_graph

# The toy by hand at b = 2, s = 8, t = 2: h = 4, width 16, 10 words; 2 bytes per element.
POINT = {"b": 2, "s": 8, "t": 2}
LAYER = {
    "param_bytes": 2 * (4 * 16 // 2 + 4 * 16 // 2 + 4),
    "flop_forward": 2 * (2 * 2 * 8 * (16 // 2) * 4),
    "flop_backward": 4 * (2 * 2 * 8 * (16 // 2) * 4),
    "saved_bytes": 2 * 2 * 8 * (4 + 4 + 16 // 2),
    "boundary_bytes": 2 * 2 * 8 * 4,
}


def collectives(size: object) -> dict[str, list[dict[str, object]]]:
    """One entry and one exit, and a part that needs all tokens but divides nothing."""
    rows = {
        "tp": [("all_reduce", "forward", 1), ("all_reduce", "backward", 1)],
        "tp_sp": [
            ("all_gather", "forward", 2),
            ("reduce_scatter", "forward", 1),
            ("all_gather", "backward", 2),
            ("reduce_scatter", "backward", 1),
        ],
    }
    return {
        mode: [
            {"kind": kind, "phase": phase, "count": count, "bytes": size}
            for kind, phase, count in row
        ]
        for mode, row in rows.items()
    }


def test_the_costs_of_a_block_at_a_point() -> None:
    found = trace_json(toy_graph((3, 2), hidden=4, vocab=10), POINT)
    assert found["at"] == POINT
    blocks = found["blocks"]
    assert isinstance(blocks, list)
    assert [(block["name"], block["repeat"]) for block in blocks] == [
        ("embed", 1),
        ("layer0", 3),
        ("layer1", 2),
        ("head", 1),
    ]
    layer = {"name": "layer0", "repeat": 3, **LAYER, "domain": []}
    assert blocks[1] == {**layer, "collectives": collectives(2 * 8 * 4 * 2)}


def test_the_costs_of_a_block_as_expressions() -> None:
    found = trace_json(toy_graph((3,), hidden=4, vocab=10), None)
    assert [*found] == [
        "name",
        "params",
        "trainable_params",
        "layers",
        "precision",
        "fingerprint",
        "at",
        "blocks",
        "notes",
    ]
    assert found["at"] is None
    blocks = found["blocks"]
    assert isinstance(blocks, list)
    assert blocks[1] == {
        "name": "layer0",
        "repeat": 3,
        "param_bytes": "8 + 256/t",
        "flop_forward": "256*b*s/t",
        "flop_backward": "512*b*s/t",
        "saved_bytes": "16*b*s + 32*b*s/t",
        "boundary_bytes": "8*b*s",
        "collectives": collectives("8*b*s"),
        "domain": [],
    }


def test_a_tied_head_owns_no_parameters() -> None:
    blocks = trace_json(toy_graph((3,), hidden=4, vocab=10, tied=True), POINT)["blocks"]
    assert isinstance(blocks, list)
    assert [block["param_bytes"] for block in blocks] == [40, LAYER["param_bytes"], 0]


def test_the_printed_trace(capsys: pytest.CaptureFixture[str]) -> None:
    # 3 layers of 4 * 16 + 4 * 16 + 4 parameters, two vocabulary matrices of 10 * 4.
    print_trace(toy_graph((3,), hidden=4, vocab=10), POINT)
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("toy: 476 parameters, 3 layers, bf16; b micro-batch, s sequence")
    for name, value in LAYER.items():
        assert f"{name} {value} " in text


@pytest.mark.parametrize(
    ("t", "reasons"), [(2, []), (3, ["tp 3 does not divide the 16 MLP width of toy."])]
)
def test_points_where_a_trace_says_nothing(t: int, reasons: list[str]) -> None:
    graph = toy_graph((3,), hidden=4, vocab=10)
    assert [*outside_trace(graph, POINT | {"t": t})] == reasons


def test_a_relation_is_printed_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    graph = toy_graph((3,), hidden=4, vocab=10)
    graph = replace(graph, head=replace(graph.head, domain=(sympy.Gt(B, 2),)), max_seq_len=16)
    print_trace(replace(graph, notes=("made by hand",)), None)
    text = " ".join(capsys.readouterr().out.split())
    assert "holds where b > 2" in text
    assert text.endswith("Note: made by hand.")
    assert [*outside_trace(graph, {"b": 2, "s": 17, "t": 1})] == [
        "toy has positions for 16 tokens.",
        "the costs of toy were traced for b > 2 only.",
    ]


def test_every_figure_is_printed_with_its_kind_and_source(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "600")  # wide enough that no cell is folded
    profiles = [(row, figure_rows(row.name)) for row in profile_rows()]
    print_profiles(profiles)
    lines = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    for row, figures in profiles:
        assert f"{row.family} {row.name}: {row.what}" in lines
        for figure in figures:
            value = "" if figure.value is None else f"{figure.value:.6g}"
            cells = (figure.path, value, figure.unit, figure.kind, figure.source)
            assert " ".join(" ".join(cells).split()) in lines


def test_the_json_of_profiles_holds_every_figure() -> None:
    profiles = [(row, figure_rows(row.name)) for row in profile_rows()]
    found = profiles_json(profiles)["profiles"]
    assert isinstance(found, list)
    assert [profile["name"] for profile in found] == [row.name for row, _ in profiles]
    for profile, (_, figures) in zip(found, profiles, strict=True):
        assert [*profile] == ["name", "family", "what", "figures"]
        assert len(profile["figures"]) == len(figures)
        for figure in profile["figures"]:
            assert [*figure] == ["path", "value", "unit", "kind", "source"]
            assert figure["source"]
            assert figure["kind"] in ("spec", "fit", "calibrated", "measured", "guess")
