"""The task over documents: batches, metrics by hand, readers, controls, and the report's parts."""

import json
import lzma

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

import ttt_jax as ttt
from experiments import adapt, config_check, settings, tasks, train
from experiments.configs import documents as config_file, documents_pretrained
from experiments.report import documents as report_documents, read, table
from experiments.tasks import document_files, document_metrics, documents
from tests.experiments import tiny_decoder
from ttt_jax import evaluation
from ttt_jax.task import Examples

VOCABULARY = document_files.in_bytes()


def tiny_config(folder):
    config = config_file.get_config()
    for name in ("validation", "reported"):
        path = tiny_decoder.write_texts(folder / f"{name}.jsonl", (40, 9, 33, 70), seed=len(name))
        config.data[name] = (path,)
    config.data.update({"chunk": 8, "chunks": 6, "window": 12, "sinks": 2, "least": 8})
    config.model.update({"width": 16, "depth": 1, "rank": 2})
    config.train.update({"num_steps": 1, "length": 16, "warmup_steps": 0, "batch_size": 4})
    config.adapt.batch_size = 2
    return config


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """A config, its task, its parameters and its reported batches."""
    config = tiny_config(tmp_path_factory.mktemp("documents"))
    task = tasks.build(config)
    params = jax.jit(task.init)(jax.random.key(0))
    (batches,) = task.streams("reported", 0).values()
    return config, task, params, batches


def test_documents_of_similar_lengths_share_a_batch(held):
    _, task, _, batches = held
    assert [batch.x["tokens"].shape for batch in batches] == [(2, 5, 8), (2, 6, 8)]
    assert [batch.y["bytes"].tolist() for batch in batches] == [[9, 33], [40, 48]]
    assert batches[0].y["name"].tolist() == ["title 1", "title 2"]
    assert document_files.padding(batches) == pytest.approx(1 - (9 + 33 + 40 + 48) / (80 + 96))
    text = task.heads()["text"](batches[0].x["tokens"][batches[0].x["mask"]][:9])
    assert len(text) == 9 and set(text) <= {*"abcdefgh "}


def test_files_are_read_packed_and_by_pattern(tmp_path):
    with lzma.open(tmp_path / "some.jsonl.xz", "wt") as file:
        file.write(json.dumps({"text": "abc", "path": "a/b.c"}) + "\n")
    packed = document_files.Source(tmp_path / "some.jsonl.xz", "*.py")
    assert packed.name == "some" and list(packed.texts()) == [("a/b.c", "abc")]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "x.md").write_text("é")
    deep = document_files.Source(tmp_path, "**/*.md")
    assert list(deep.texts()) == [("x.md", "é")] and deep.checksum() != packed.checksum()
    (tmp_path / "bad.jsonl").write_text('{"words": 1}\n')
    with pytest.raises(ValueError, match=r"an object with a text 'text'; line 1 has \['words'\]"):
        list(document_files.Source(tmp_path / "bad.jsonl", "").texts())
    with pytest.raises(ValueError, match="without any"):
        document_files.Source(tmp_path, "*.rs").files()


def test_metrics_by_hand():
    """Two documents of four chunks of two bytes; the second ends after three bytes."""
    mask = np.array([[[1, 1]] * 4, [[1, 1], [1, 0], [0, 0], [0, 0]]], bool)
    x = {"tokens": np.full(mask.shape, 65), "mask": mask}
    examples = Examples(np.arange(2), x, {"bytes": mask.sum((1, 2))}, {})
    chunks = np.array([[8.0, 8.0, 4.0, 4.0], [4.0, 2.0, 0.0, 0.0]])
    source = np.log(2) * np.stack([chunks, 0 * chunks], -1)
    output = source * np.array([[1, 1, 0.5, 0.5], [1.5, 1, 1, 1]])[..., None]
    values = {}
    for name, metric in document_metrics.of(VOCABULARY).items():
        sums = metric.of(output, source, examples)
        values[name] = metric.value(jax.tree.map(lambda leaf: leaf.sum(0), sums))
    assert values["bits_per_byte"] == pytest.approx((20 / 8 + 8 / 3) / 2)
    assert values["pooled_bits_per_byte"] == pytest.approx(28 / 11)
    assert values["saved"] == pytest.approx((4 / 24 - 2 / 6) / 2)
    assert (values["harmed"], values["agreement"]) == (0.5, 0.0)
    assert values["bits_by_position"] == pytest.approx([14 / 4, 12 / 5, 2 / 2])
    assert values["saved_by_position"] == pytest.approx([-2 / 12, 2 / 14, 2 / 4])
    assert values["saved_by_quarter"] == pytest.approx([-2 / 12, 0, 2 / 6, 2 / 4])


def whole(task, params, document):
    """Nats of each token of a document that is read in one call, without chunks or cache."""
    ids = document["tokens"][document["mask"]]
    inputs = jnp.concatenate([jnp.zeros(1, jnp.int32), ids[:-1]])[None]
    config, module, _ = document_model(task)
    logits = module.clone(window=config.data.window, sinks=config.data.sinks).apply(params, inputs)
    return -jax.nn.log_softmax(logits[0])[jnp.arange(len(ids)), ids]


def document_model(config):
    vocabulary, module, init = documents._model(config)
    return config, module, init


def test_chunks_with_a_cache_score_as_one_call_does(held):
    config, task, params, batches = held
    nats = np.asarray(jax.jit(task.heads()["score"])(params, batches[1].x))
    for row in range(2):
        document = jax.tree.map(lambda leaf, r=row: leaf[r], batches[1].x)
        due = whole(config, params, document)
        np.testing.assert_allclose(nats[row][document["mask"]], due, atol=1e-4)


def test_isolated_windows_see_nothing_else(held):
    config, task, params, batches = held
    score = jax.jit(task.heads(cache="isolated")["score"])
    x = batches[1].x
    changed = {**x, "tokens": x["tokens"].copy()}
    changed["tokens"][:, 0, 3] += 1  # of the first window of 12
    first, second = (np.asarray(score(params, batch)).reshape(2, -1) for batch in (x, changed))
    assert (first[:, :12] != second[:, :12]).any()
    np.testing.assert_array_equal(first[:, 12:], second[:, 12:])


def test_a_step_size_of_zero_is_the_control(held):
    config, task, params, batches = held
    heads, x = task.heads(), batches[1].x
    made = settings.candidates(config, task)["still"][0]
    still = made.bind(params, 0).build(made.bind(params, 0).values)
    keys = ttt.sample_keys(jax.random.key(0), batches[1].id)
    output, info = jax.jit(ttt.batched(still))(params, x, keys)
    np.testing.assert_array_equal(output, jax.jit(heads["score"])(params, x))
    assert info.ok.all() and not info.updated.any()


def rows_of(label, config, task, params):
    made = settings.candidates(config, task)[label][0]
    run = evaluation.Evaluation(task, params, role="reported", seed=0)
    method = made.bind(params, 0)
    return made, run.rows(label, method, run.streams)


def test_an_adapter_that_all_share_learns_from_the_batch_before(held):
    """Its first batch is scored before it knows another one; both are no per-document rows."""
    config, task, params, _ = held
    made, (row,) = rows_of("shared", config, task, params)
    assert made.scope == "stream" and row.num_examples == 4 and row.values["drift"] > 0
    assert np.isfinite(row.values["bits_per_byte"])


def test_another_documents_adapter(held):
    """By hand: adapt to the first document, score the second, and the reverse."""
    config, task, params, batches = held
    made = settings.candidates(config, task)["crossed"][0]
    method = made.bind(params, 0).build(made.bind(params, 0).values).method
    heads, x, key = task.heads(), batches[1].x, jax.random.key(0)
    output, info = jax.jit(method)(params, x, key)
    single = made.settings | {"num_steps": 1}
    optimizer = settings.optimizer(single)
    read_once = ttt.methods.document_ttt(
        heads["read"], optimizer=optimizer, select=ttt.select.everything(), bos=0
    )
    # A document twice as long, the other one behind it: its second half is not what is scored
    # here, so the adapted parameters are made step by step instead.
    fast = params
    state = optimizer.init(params)
    memory = heads["read"].init(1, 48, 8)
    for chunk in range(6):
        tokens = jnp.asarray(x["tokens"][0].reshape(-1))
        inputs = jnp.concatenate([jnp.zeros(1, jnp.int32), tokens[:-1]])
        at = slice(8 * chunk, 8 * chunk + 8)
        given = {"tokens": inputs[None, at], "positions": jnp.arange(48)[None, at]}
        mask = jnp.asarray(x["mask"][0].reshape(-1)[at], jnp.float32)

        def loss(params, memory=memory, given=given, at=at, mask=mask, tokens=tokens):
            logits, after = heads["read"].read(params, memory, given)
            nats = -jax.nn.log_softmax(logits[0])[jnp.arange(8), tokens[at]]
            return (nats * mask).sum() / jnp.maximum(mask.sum(), 1), after

        grads, memory = jax.jit(jax.grad(loss, has_aux=True))(fast)
        updates, state = optimizer.update(grads, state, fast)
        fast = jax.tree.map(jnp.add, fast, updates)
    other = jax.tree.map(lambda leaf: leaf[1:], x)
    due = jax.jit(heads["score"])(fast, other)[0]
    np.testing.assert_allclose(output[1], due, atol=1e-4)
    assert bool(info.updated) and read_once is not None
    with pytest.raises(ValueError, match="at least two documents"):
        method(params, other, key)


def test_a_pretrained_folder_goes_through_the_programs(tmp_path):
    config = documents_pretrained.get_config()
    tiny_decoder.stand_in(config, tmp_path)
    config.data.update({"chunk": 8, "chunks": 4, "window": 12, "sinks": 2})
    config.model.rank = 2
    config.adapt.batch_size = 2
    config.methods = ml_collections.ConfigDict(
        {
            "source": {},
            "recomputed": {"method": "source", "cache": "recomputed"},
            "document_ttt": {"learning_rate": 0.1, "select": "lora"},
        }
    )
    folder = str(tmp_path / "run")
    train.run(config, folder)
    assert adapt.run(config, folder, devices=1) == 0
    data = table.prepare(read.results(folder))
    lines = report_documents.lines(data)
    assert lines.index.tolist() == [
        ("reported", name) for name in ("recomputed", "source", "document_ttt")
    ]
    assert (lines["documents"] == "3").all() and lines["saved, median (%)"].notna().all()
    shown = report_documents.shown_passages(tmp_path / "run", [])
    assert {document["name"] for document in shown} == {"title 0", "title 1", "title 2"}
    assert all(passage["text"] for document in shown for passage in document["passages"])
    (tmp_path / "run" / "passages.json").write_text("[{}]")
    said = []
    assert report_documents.shown_passages(tmp_path / "run", said) == [] and "damaged" in said[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train.num_steps": 0},
            "train.num_steps must be at least 1 for model.name='byte_decoder'",
        ),
        ({"model.name": "pretrained"}, "the config lacks model.source"),
        ({"data.reported": ()}, "data.reported must be a path, or a tuple of paths"),
        ({"methods.document_ttt.cache": "new"}, r"methods\.document_ttt\.cache must be one of"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(change, message):
    config = config_file.get_config()
    for name, value in change.items():
        *sections, last = name.split(".")
        place = config
        for section in sections:
            place = place[section]
        place[last] = value
    with pytest.raises(config_check.ConfigError, match=message):
        config_check.check(config)
