"""A batch that knows which of its entries have been read.

What `make_batch` gives and nobody reads is a misspelt name: training would go on without it.
"""

from collections.abc import ItemsView, Iterator, Mapping, ValuesView


class WatchedBatch(dict[str, object]):
    """A batch, a dictionary of tensors; `unread` are the names that were not looked up so far."""

    def __init__(self, batch: Mapping[str, object]) -> None:
        super().__init__(batch)
        self.unread = set(batch)

    def __getitem__(self, name: str) -> object:
        self.unread.discard(name)
        return super().__getitem__(name)

    def get(self, name: str, default: object = None) -> object:
        """The entry of a name, else `default`."""
        return self[name] if name in self else default  # noqa: SIM401 (this is `get`)

    # Whoever goes through all entries has read all.
    def __iter__(self) -> Iterator[str]:
        self.unread.clear()
        return super().__iter__()

    def values(self) -> ValuesView[object]:  # type: ignore[override]
        """All entries."""
        self.unread.clear()
        return super().values()

    def items(self) -> ItemsView[str, object]:  # type: ignore[override]
        """All names and entries."""
        self.unread.clear()
        return super().items()
