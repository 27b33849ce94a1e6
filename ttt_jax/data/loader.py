"""Loading: a source and a plan become batches; both iterators resume from a saved position.

grain does the reading, batching and, where asked, the work in other processes.
"""

import itertools
import operator
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ttt_jax import _arguments, _extras
from ttt_jax.data import corruptions
from ttt_jax.data.sources import Batch, Example, Source
from ttt_jax.data.streams import Plan

Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]
_Row = tuple[Example, str, int]


class DomainBatch(NamedTuple):
    """A batch of a stream.

    Attributes:
      id: int64 ``[N]``.
      image: float32 ``[N, H, W, C]`` in [0, 1], corrupted as the plan says.
      label: int32 ``[N]``.
      domain: str ``[N]``.
      severity: int32 ``[N]``.
    """

    id: np.ndarray
    image: np.ndarray
    label: np.ndarray
    domain: np.ndarray
    severity: np.ndarray


class _Rows:
    """The rows of a plan as a grain source; row i depends on nothing but i."""

    def __init__(self, source: Source, plan: Plan, seed: int):
        self._source, self._plan, self._seed = source, plan, seed

    def __len__(self) -> int:
        return len(self._plan.index)

    def __getitem__(self, row: int) -> _Row:
        example = self._source[int(self._plan.index[row])]
        domain, severity = str(self._plan.domain[row]), int(self._plan.severity[row])
        image = example.image
        if domain != "clean":
            # The published protocol corrupts an example once: not anew each time it is read.
            seed = (self._seed, example.id)
            image = corruptions.corrupt(image, domain, severity, seed=seed)
        return example._replace(image=image), domain, severity


def _stack(rows: Sequence[_Row]) -> DomainBatch:
    examples, domains, severities = zip(*rows, strict=True)
    return DomainBatch(
        *_stack_examples(examples), np.asarray(domains), np.asarray(severities, np.int32)
    )


def _stack_examples(rows: Sequence[Example]) -> Batch:
    ids, images, labels = zip(*rows, strict=True)
    return Batch(np.asarray(ids, np.int64), np.stack(images), np.asarray(labels, np.int32))


class Loader:
    """Batches of a stream. Iterate it as often as you like; every pass gives the same batches.

    Every row of the plan comes exactly once and in order; the last batch may be shorter.

    Attributes:
      split: the source's split string.
    """

    @_arguments.checked(
        batch_size=_arguments.integer, seed=_arguments.integer, num_workers=_arguments.integer
    )
    def __init__(
        self,
        source: Source,
        plan: Plan,
        *,
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
    ):
        """Checks the plan against the source.

        Args:
          source: the set.
          plan: which example comes when, from :mod:`ttt_jax.data.streams`.
          batch_size: rows per batch, at least 1.
          seed: of the corruptions; each example is corrupted with ``(seed, its id)``.
          num_workers: grain worker processes; 0 reads in the calling thread.

        Raises:
          ValueError: a batch size below 1, a negative seed or worker count, an empty plan, a
            plan of unequal columns, with an index outside the source, an unknown domain or a
            severity that does not fit it.
        """
        if operator.index(batch_size) < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
        if operator.index(seed) < 0 or operator.index(num_workers) < 0:
            raise ValueError(
                f"seed and num_workers must not be negative, but are {seed} and {num_workers}."
            )
        lengths = {len(column) for column in plan}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                "A plan has three columns of one length and at least one row, but its lengths are "
                f"{', '.join(str(len(column)) for column in plan)}."
            )
        outside = (plan.index < 0) | (plan.index >= len(source))
        if outside.any():
            raise ValueError(
                f"Row {int(np.argmax(outside))} of the plan asks for example "
                f"{plan.index[np.argmax(outside)]}, but {source.name}/{source.split} has "
                f"{len(source)}; make the plan from the same source."
            )
        for domain, severity in {*zip(plan.domain.tolist(), plan.severity.tolist(), strict=True)}:
            if (domain, severity) != ("clean", 0):
                corruptions.check_name(domain, severity)
        self.source = source
        self.plan = plan
        self.split = source.split
        self._batch_size = int(batch_size)
        self._seed = int(seed)
        self._num_workers = int(num_workers)

    def __len__(self) -> int:
        """Number of batches, the last, shorter one included."""
        return -(-len(self.plan.index) // self._batch_size)

    def __iter__(self) -> "LoaderIterator":
        return LoaderIterator(self)

    def _stream(self, start: int) -> Iterator[DomainBatch]:
        grain = _extras.load("grain", "data")

        rows = grain.MapDataset.source(_Rows(self.source, self.plan, self._seed))
        batches = rows.batch(self._batch_size, drop_remainder=False, batch_fn=_stack)[start:]
        # Reading in the calling thread keeps errors and interrupts where they belong.
        here = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        stream = batches.to_iter_dataset(here)
        if self._num_workers:
            from absl import flags

            # grain's workers read absl flags, which only an absl program has parsed.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._num_workers))
        return iter(stream)

    def _fingerprint(self) -> str:
        crc = zlib.crc32(repr((self._batch_size, self._seed, self.source.name)).encode())
        crc = zlib.crc32(np.ascontiguousarray(self.plan.index, "<i8").tobytes(), crc)
        crc = zlib.crc32("\n".join(self.plan.domain.tolist()).encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(self.plan.severity, "<i4").tobytes(), crc)
        return f"{crc:08x}"


class LoaderIterator:
    """One pass over a :class:`Loader`; its position can be saved and set."""

    def __init__(self, loader: Loader):
        self._loader = loader
        self._next = 0
        self._stream: Iterator[DomainBatch] | None = None

    def __iter__(self) -> "LoaderIterator":
        return self

    def __next__(self) -> DomainBatch:
        if self._next >= len(self._loader):
            self._stream = None
            raise StopIteration
        if self._stream is None:
            self._stream = self._loader._stream(self._next)
        batch = next(self._stream)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position, ready for JSON: ``{"next_batch": int, "stream": str}``.

        It does not depend on ``num_workers``, so a stream may go on with another number.
        """
        return {"next_batch": self._next, "stream": self._loader._fingerprint()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position from :meth:`get_state`, of this or an equal loader.

        Raises:
          ValueError: the state belongs to another plan, batch size, seed or source, or its
            position lies outside the stream.
        """
        here = self._loader._fingerprint()
        if state.get("stream") != here:
            raise ValueError(
                f"A saved position fits the stream it came from, {state.get('stream')!r}, not "
                f"this one, {here!r}; use the same source, plan, batch size and seed."
            )
        position = state.get("next_batch")
        if not isinstance(position, int) or not 0 <= position <= len(self._loader):
            raise ValueError(
                f"A saved position lies between 0 and {len(self._loader)}, not {position!r}."
            )
        self._next = position
        self._stream = None


class _Augmented:
    """Applies ``augment`` to every image of a batch, with the generator grain gives the step."""

    def __init__(self, augment: Augment):
        self._augment = augment

    def __call__(self, batch: Batch, rng: np.random.Generator) -> Batch:
        images = np.stack([np.asarray(self._augment(image, rng)) for image in batch.image])
        return batch._replace(image=images.astype(np.float32))


@_arguments.checked(
    batch_size=_arguments.integer, seed=_arguments.integer, start_step=_arguments.integer
)
def training_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    augment: Augment | None = None,
    start_step: int = 0,
) -> Iterator[Batch]:
    """Endless training batches, shuffled anew each epoch, the remainder of an epoch dropped.

    Step k gives the same batch whether the iterator started at 0 or at k, augmentation
    included, so a training run resumes from its step number alone.

    Args:
      source: the set.
      batch_size: examples per step, from 1 to ``len(source)``.
      seed: of the order and the augmentation, from 0 to 2**32 - 1.
      augment: ``augment(image [H, W, C] float32, generator) -> image``, NumPy; None for none.
      start_step: the first step to give.

    Raises:
      ValueError: a batch size or seed outside its range, or a negative ``start_step``.
    """
    _check_training(source, batch_size, seed, start_step)
    grain = _extras.load("grain", "data")

    data = grain.MapDataset.source(source).shuffle(seed=int(seed))
    data = data.batch(int(batch_size), drop_remainder=True, batch_fn=_stack_examples).repeat()
    if augment is not None:
        data = data.random_map(_Augmented(augment), seed=int(seed))
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(data[int(start_step) :].to_iter_dataset(options))


@_arguments.checked(
    batch_size=_arguments.integer, seed=_arguments.integer, start_step=_arguments.integer
)
def training_places(
    source: Source, *, batch_size: int, seed: int, start_step: int = 0
) -> Iterator[np.ndarray]:
    """Endless training order as places in the source, int64 ``[batch_size]`` per step.

    For a training loop that holds the whole set on its accelerator: no example is read. The rules
    are those of :func:`training_batches` (shuffled anew each epoch, the remainder dropped, step k
    the same wherever it started); the order itself is another one.

    Args:
      source: the set.
      batch_size: examples per step, from 1 to ``len(source)``.
      seed: of the order, from 0 to 2**32 - 1.
      start_step: the first step to give.

    Raises:
      ValueError: as :func:`training_batches`.
    """
    _check_training(source, batch_size, seed, start_step)
    return _places(len(source), operator.index(batch_size), operator.index(seed), start_step)


def _places(size: int, batch_size: int, seed: int, step: int) -> Iterator[np.ndarray]:
    per_epoch = size // batch_size
    for epoch in itertools.count(step // per_epoch):
        order = np.random.default_rng((seed, epoch)).permutation(size)
        for k in range(step % per_epoch, per_epoch):
            yield order[k * batch_size : (k + 1) * batch_size]
        step = 0


def _check_training(source: Source, batch_size: int, seed: int, start_step: int) -> None:
    if not 1 <= operator.index(batch_size) <= len(source):
        raise ValueError(
            f"batch_size must lie between 1 and the {len(source)} examples of "
            f"{source.name}/{source.split}, but is {batch_size}."
        )
    if not 0 <= operator.index(seed) < 2**32:
        raise ValueError(f"seed must lie between 0 and 2**32 - 1, but is {seed}.")
    if operator.index(start_step) < 0:
        raise ValueError(f"start_step must not be negative, but is {start_step}.")
