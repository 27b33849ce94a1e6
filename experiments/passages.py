"""The passages of documents on which adapting gained and lost most, as text."""

import pathlib
from typing import Any

import numpy as np

from experiments import examples
from ttt_jax import evaluation
from ttt_jax.task import Examples, Metric, Task

FILE = "passages.json"
_MOST_DOCUMENTS = 100
_MOST_PASSAGES = 2
_MOST_CHARACTERS = 600


def _extremes(output: Any, source: Any, examples: Examples) -> Any:
    """Per document the chunks with the most and the least bits saved, the least last."""
    if not isinstance(examples.x, dict) or "tokens" not in examples.x:
        return None
    before, after = (np.asarray(nats, np.float64).sum(-1) / np.log(2) for nats in (source, output))
    saved = before - after
    order = np.argsort(-saved, axis=1, kind="stable")
    places = np.arange(2 * _MOST_PASSAGES) % order.shape[1]
    at = np.concatenate(
        [order[:, places[:_MOST_PASSAGES]], order[:, ::-1][:, places[:_MOST_PASSAGES]]], axis=1
    )
    rows = np.arange(len(at))[:, None]
    whole = np.stack([before.sum(1), after.sum(1)], axis=1)
    return {"at": at, "before": before[rows, at], "after": after[rows, at], "whole": whole}


def keeper(task: Task) -> examples.Keeper:
    """Keeps the passages of one method's documents; ``task`` has a head ``text``, ids to text.

    ``passages.json`` has an object per document: ``stream``, ``name``, the bits ``before`` and
    ``after`` of the whole, and ``passages``, each with its chunk ``at``, its bits and its text.
    """
    decode = task.heads()["text"]

    def add(source: evaluation.Evaluation, row: evaluation.Row, path: pathlib.Path) -> None:
        each = row.each["passages"]
        texts = {}
        for batch in source.batches(row.stream):
            for number, identity in enumerate(batch.id.tolist()):
                texts[identity] = (batch, number)
        made = []
        for index, identity in enumerate(row.id.tolist()[:_MOST_DOCUMENTS]):
            batch, number = texts[identity]
            before, after = each["whole"][index].tolist()
            held = {"stream": row.stream, "name": str(batch.y["name"][number])}
            held |= {"before": before, "after": after, "passages": []}
            for slot, at in enumerate(each["at"][index].tolist()):
                bits = [float(each[side][index, slot]) for side in ("before", "after")]
                gained = slot < _MOST_PASSAGES
                # A document may have gained, or lost, everywhere.
                if (bits[0] > bits[1]) == gained and bits[0] != bits[1]:
                    ids = batch.x["tokens"][number, at][batch.x["mask"][number, at]]
                    text = decode(ids)[:_MOST_CHARACTERS]
                    held["passages"].append(
                        {"at": at, "before": bits[0], "after": bits[1], "text": text}
                    )
            made.append(held)
        examples.keep_stream(path, row.stream, made)

    return examples.Keeper(FILE, {"passages": Metric(_extremes, lambda sums: 0.0)}, add)
