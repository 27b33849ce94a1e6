"""The one exception of this package."""


class CheckpointError(ValueError):
    """A checkpoint, or what is asked of it, is not right; the message names leaf or file."""
