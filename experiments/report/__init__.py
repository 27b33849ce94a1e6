"""Tables, charts and pages from the rows of a run, of a sweep or of a kept result file.

In a notebook::

    from experiments.report import charts, read, table

    data = table.prepare(read.results("runs/demo"))
    table.pivot(data)  # a frame
    charts.figure(data, "means")  # an altair chart

``python -m experiments.report --workdir=runs/demo`` writes the page and prints the table.
"""
