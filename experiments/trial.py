"""One unit of a sweep in a process of its own: trains a model, or adapts it for one trial.

``experiments.sweep`` starts it; it can be run by hand with the command in ``command.txt`` of the
unit's folder. What an earlier process of the same unit finished is kept.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from experiments import adapt, launch, problem as problem_lib, train
from experiments.sweeping import plan

# An earlier process of the unit may live on, such as on a node that a scheduler lost sight of. It
# is waited for, and what it finished is not done again.
_PATIENCE_S = 3600


def run(config: str, workdir: str, unit: plan.Unit) -> int:
    """Does the work of a unit; returns the exit status, 1 if a row failed.

    Args:
      config: path of the config file.
      workdir: the folder of the sweep.
      unit: what to do.

    Raises:
      UserError: the config file or the code is no longer what the sweep planned.
    """
    found = plan.variants(config)
    if unit.index >= len(found) or plan.digest(found[unit.index]) != unit.digest:
        raise launch.UserError(
            f"{config} or the code has changed since the sweep began; run the sweep again: what "
            "is still valid is kept."
        )
    variant = found[unit.index]
    folder = unit.folder(pathlib.Path(workdir))
    attempt = launch.open_workdir(str(folder / "attempt"))
    with launch.locked(attempt, patience_s=_PATIENCE_S):
        if unit.needs is None:
            train.run(variant.config, str(folder))
            return 0
        model = pathlib.Path(workdir) / "models" / unit.needs
        return adapt.run(
            variant.config,
            str(folder),
            checkpoint_path=str(problem_lib.checkpoint_path(model, variant.seed)),
            part=variant.part,
        )


def command(python: str, config: str, workdir: str, unit: plan.Unit) -> list[str]:
    """The command line that runs a unit."""
    values = {"config": config, "workdir": workdir, **unit._asdict()}
    given = {name: value for name, value in values.items() if value is not None}
    return [python, "-m", "experiments.trial", *(f"--{name}={v}" for name, v in given.items())]


def main(argv: Sequence[str]) -> int:
    """The program."""
    del argv
    values = {name: holder.value for name, holder in _FLAGS.items()}
    config, workdir = values.pop("config"), values.pop("workdir")
    return run(config, workdir, plan.Unit(**values))


if __name__ == "__main__":
    _FLAGS = {
        "config": flags.DEFINE_string("config", None, "The config file.", required=True),
        "workdir": flags.DEFINE_string("workdir", None, "Folder of the sweep.", required=True),
        "kind": flags.DEFINE_enum("kind", None, ["model", "trial"], "What to do.", required=True),
        "id": flags.DEFINE_string("id", None, "Id of the unit.", required=True),
        "index": flags.DEFINE_integer("index", None, "Of the variant.", required=True),
        "digest": flags.DEFINE_string("digest", None, "Of the variant.", required=True),
        "needs": flags.DEFINE_string("needs", None, "Id of the model of a trial."),
        "label": flags.DEFINE_string("label", "", "For people."),
    }
    launch.run(main)
