"""Runs every slip and writes the counts.

python -m tests.core.fuzz [--write after|before] [--show silent|unclear] [NAME ...]
"""

import argparse
import time

from tests.core.fuzz import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="functions; all of them without")
    parser.add_argument("--write", choices=("before", "after"))
    parser.add_argument("--show", action="append", default=[])
    options = parser.parse_args()
    start = time.process_time()
    outcomes = table.measured(options.names)
    for outcome in outcomes:
        if outcome.outcome in options.show:
            print(
                f"{outcome.outcome}  {outcome.function}  {outcome.slip}\n    {outcome.seen[:300]}"
            )
    counts = table.counts(outcomes)
    print({name: sum(row[name] for row in counts.values()) for name in table.COLUMNS})
    print(f"{len(counts)} functions, {time.process_time() - start:.0f} s of CPU")
    if options.write:
        table.write(counts, options.write)


if __name__ == "__main__":
    main()
