"""The pieces of :mod:`experiments.report`: rows, tables, figures, page, terminal."""
