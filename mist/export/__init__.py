"""Plans as files of other frameworks, and such files as layouts; see `mist.export.targets`."""
