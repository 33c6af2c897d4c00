"""Sizes that stand for all: a symbol's hint decides branches on shapes.

Three samples and a sequence with many divisors are typical; a short limit is halved, so that the
hint is no limit of the model.
"""

from typing import Final

from mist.trace.models.loader import LoadedModel

BATCH_HINT: Final = 3
SEQ_HINT: Final = 384


def seq_hint(model: LoadedModel, asked: int | None) -> int:
    """The sequence length [tokens] that decides branches: `asked`, where one is asked for."""
    limit = model.max_seq_len
    if asked is not None:
        return asked if limit is None else min(asked, limit)
    return SEQ_HINT if limit is None or limit > SEQ_HINT else max(limit // 2, 2)
