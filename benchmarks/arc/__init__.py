"""ARC-AGI by joint test-time training of a decoder of grids; see :mod:`benchmarks.arc.__main__`."""
