"""The pieces of :mod:`experiments.merge`: ranges of a split, rows and records of parts as one."""
