"""The model of one seed of a run: its evaluations by role, and the candidates bound to it."""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import tqdm

from experiments import (
    choice,
    examples,
    grids,
    journal,
    launch,
    passages,
    provenance,
    result_rows,
    settings,
    units,
    writers,
)
from ttt_jax import checkpoint, evaluation, tuning


def _chunk_size(config: ml_collections.ConfigDict) -> int | str | None:
    size = launch.setting(config, "adapt.chunk_size")
    return "fastest" if size is None and jax.default_backend() != "cpu" else size


class SeedRun:
    """The model of one seed: its evaluations by role, and its measured source statistics."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        task: Any,
        held: checkpoint.Pristine,
        seed: int,
        restore: str,
        mesh: Any,
        folder: pathlib.Path,
        shard: journal.Shard = journal.WHOLE,
    ):
        self.task, self.seed, self.fingerprint = task, seed, held.fingerprint
        self.shard = shard
        self._config, self._held = config, held
        self._restore, self._mesh = restore, mesh
        self._pictured: Callable[..., evaluation.Evaluation] = evaluation.Evaluation
        self._bound: dict[int, evaluation.Parametric] = {}
        self._evaluations: dict[str, evaluation.Evaluation] = {}
        self._chunk_sizes = provenance.ChunkSizes(folder)

    def evaluation_of(self, role: str) -> evaluation.Evaluation:
        """That of a role, made once; all share compiled programs with all other seeds."""
        if role not in self._evaluations:
            make = self._pictured if role == "reported" else evaluation.Evaluation
            self._evaluations[role] = make(
                self.task,
                lambda: self._held.restore(self._restore),
                role=role,
                seed=self.seed,
                chunk_size=_chunk_size(self._config),
                chunk_sizes=self._chunk_sizes,
                mesh=self._mesh,
                parallel_streams=launch.setting(self._config, "adapt.parallel_streams"),
            )
            self._evaluations[role].programs = units.programs(self._config, self._mesh)
        return self._evaluations[role]

    def bound(self, candidate: settings.Candidate) -> evaluation.Parametric:
        """The candidate with the statistics that it measures, once."""
        if id(candidate.bind) not in self._bound:
            params = self._held.restore("memory")
            self._bound[id(candidate.bind)] = candidate.bind(params, self.seed)
        return self._bound[id(candidate.bind)]

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams that choose settings."""
        return self._choosing().streams

    def _choosing(self) -> evaluation.Evaluation:
        passes = launch.setting(self._config, "adapt.selection_passes")
        return self.evaluation_of("choosing" if passes > 1 else "validation")

    def score(self, candidate: settings.Candidate) -> dict[str, Any]:
        """The scores of a candidate on those by metric, or the message of its failure."""
        try:
            method = self.bound(candidate)
            trial = tuning.tried(self._choosing(), self.task, candidate.label, method)
        except units.ERRORS as failure:
            # The evaluation will meet the same failure and record it as rows.
            return {"message": f"{failure}"[:500]}
        return dict(trial.scores)

    def choose(
        self,
        path: pathlib.Path,
        candidates: Mapping[str, Sequence[settings.Candidate]],
    ) -> dict[str, settings.Candidate]:
        """The candidate per method that the validation streams choose."""
        label = examples.shown(candidates)
        if label and self.seed == self._config.seeds[0]:
            heads, keeper = self.task.heads(), examples.PICTURES
            if "text" in heads or "attempts" in heads:
                keeper = (passages if "text" in heads else grids).keeper(self.task)
            kept = functools.partial(examples.KeptEvaluation, label=label, keeper=keeper)
            self._pictured = functools.partial(kept, folder=path.parent)
        return choice.choose(path, candidates, self.task, self, self.shard)

    def evaluate(
        self,
        role: str,
        chosen: Mapping[str, settings.Candidate],
        domains: Sequence[str],
        results: journal.Journal,
        writer: writers.Writer,
    ) -> None:
        """Adds the missing rows of one role; a failing unit becomes failed rows."""
        fields = {
            "dataset": self.task.name,
            "seed": self.seed,
            "split_role": role,
            "checkpoint": self.fingerprint,
            "chooses": self.task.chooses,
        }
        result_rows.require_checkpoint(results, fields)
        work = units.missing(self, role, chosen, domains, results, fields)
        # None hides it where nobody looks.
        for unit in tqdm.tqdm(work, desc=f"{role} seed {self.seed}", disable=None):
            rows = units.rows(self, role, unit, fields, results.path.parent)
            results.add(*(row for row in rows if results.get(**row) is None))
            for row in rows:
                if row["status"] == "ok":
                    name = f"{role}/{row['method']}/{row['stream']}"
                    writer.scalars(self.seed, {name: row[self.task.chooses]}, self.seed)
