"""The pieces of :mod:`experiments.merge`: what parts share, and one file per program."""
