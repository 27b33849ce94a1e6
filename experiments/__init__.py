"""Programs that train, adapt and report; each runs as ``python -m experiments.NAME``."""
