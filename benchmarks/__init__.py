"""What is timed, and beside which peer; each runs as ``python -m benchmarks.NAME``."""
