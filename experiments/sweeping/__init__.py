"""Many trials of one config: what they are, how one runs, how they are counted and collected."""
