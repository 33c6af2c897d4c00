"""The picture of a trace: every operation and every arc of the listing, and its numbers."""

from xml.etree import ElementTree

from mist.report.operation_graph import graph_svg, rows_of

LISTING = """# 0:embed
embedding_default = aten.embedding.default(input_1, input_2) -> float32[b, s, 16] flop=0 \
bytes=136*b*s phase=forward module=embed
# 2:Layer
view_default = aten.view.default(input_1) -> float32[b*s, 16] flop=0 bytes=0 phase=forward module=up
mm_default = aten.mm.default(view_default, input_2) -> float32[b*s, 64] flop=2048*b*s/t \
bytes=320*b*s + 4096/t phase=forward module=up
mm_default_1 = aten.mm.default(mm_default, view_default) -> float32[64, 16] flop=2048*b*s/t \
bytes=320*b*s phase=backward module=up & down
""".replace("\\\n", "")
SVG = "{http://www.w3.org/2000/svg}"


def test_rows() -> None:
    blocks = rows_of(LISTING)
    assert {name: len(rows) for name, rows in blocks.items()} == {"0:embed": 1, "2:Layer": 3}
    view, product, _ = blocks["2:Layer"]
    assert (view.kind, product.kind, blocks["0:embed"][0].kind) == ("view", "product", "memory")
    assert product.inputs == ("view_default", "input_2")
    assert (product.flop, product.bytes) == ("2048*b*s/t", "320*b*s + 4096/t")


def test_svg_has_every_operation_and_every_arc() -> None:
    root = ElementTree.fromstring(graph_svg(LISTING))
    groups = root.findall(f"{SVG}g")
    assert [group.get("class") for group in groups] == ["memory", "view", "product", "product"]
    titles = [group.findtext(f"{SVG}title") for group in groups]
    assert titles[3] == ("mm_default_1: float32[64, 16]; 2048*b*s/t FLOPs, 320*b*s bytes, backward")
    # view -> mm, mm -> mm_1, view -> mm_1; inputs of the block have no row.
    assert len(root.findall(f"{SVG}path")) == 3
