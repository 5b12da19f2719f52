"""Sources of data, one file each. Every one returns :class:`~alkn.splits.Splits`."""
