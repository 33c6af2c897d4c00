"""A figure as the content of a PNG file, which says that Mist drew it."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def png_of(figure: "Figure") -> bytes:
    """The content of the file; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    # Matplotlib would write its version into the file, and other bytes after every update. By the
    # name commands know a picture that they may replace (`mist.cli.outputs`).
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": "Mist"})
    return buffer.getvalue()
