"""The pieces of :mod:`experiments.merge`: ranges of a split, rows of several ranges as one."""
