"""The task over documents: batches, metrics by hand, readers, controls, and the report's parts."""

import json
import lzma

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

import ttt_jax as ttt
from experiments import adapt, config_check, settings, tasks, train
from experiments.configs import documents as config_file, documents_pretrained
from experiments.report import documents as report_documents, read, table
from experiments.tasks import document_files, document_metrics, documents
from tests.experiments import tiny_decoder
from ttt_jax.task import Examples

VOCABULARY = document_files.in_bytes()


def tiny_config(folder):
    config = config_file.get_config()
    for name in ("validation", "reported"):
        path = tiny_decoder.write_texts(folder / f"{name}.jsonl", (40, 9, 33, 70), seed=len(name))
        config.data[name] = (path,)
    config.data.update({"chunk": 8, "chunks": 6, "window": 12, "sinks": 2, "least": 8})
    config.model.update({"width": 16, "depth": 1, "rank": 2})
    config.train.update({"num_steps": 1, "length": 64, "warmup_steps": 0, "batch_size": 4})
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
    assert values["padding"] == pytest.approx(5 / 16)
    assert values["bits_by_position"] == pytest.approx([14 / 4, 12 / 5, 2 / 2])
    assert values["saved_by_position"] == pytest.approx([-2 / 12, 2 / 14, 2 / 4])
    assert values["saved_by_quarter"] == pytest.approx([-2 / 12, 0, 2 / 6, 2 / 4])


def whole(config, params, document):
    """Nats of each token of a document that is read in one call, without chunks or cache."""
    ids = document["tokens"][document["mask"]]
    inputs = jnp.concatenate([jnp.zeros(1, jnp.int32), ids[:-1]])[None]
    _, module, _ = documents._model(config)
    module = module.clone(window=config.data.window, sinks=config.data.sinks)
    logits = jax.jit(module.apply)(params, inputs)
    return -jax.nn.log_softmax(logits[0])[jnp.arange(len(ids)), ids]


def test_chunks_with_a_cache_score_as_one_call_does(held):
    config, task, params, batches = held
    nats = np.asarray(jax.jit(task.heads()["score"])(params, batches[1].x))
    for row in range(2):
        document = jax.tree.map(lambda leaf, r=row: leaf[r], batches[1].x)
        due = whole(config, params, document)
        np.testing.assert_allclose(nats[row][document["mask"]], due, atol=1e-4)


def test_keys_made_anew_are_those_of_a_sequence_that_fills_the_window(held):
    config, task, params, batches = held
    tokens = batches[1].x["tokens"][1]
    nats = jax.jit(task.heads(cache="recomputed")["score"])(params, batches[1].x)[1]
    _, module, _ = documents._model(config)
    apply = jax.jit(module.apply)
    inputs = np.concatenate([[0], tokens.reshape(-1)[:-1]])
    for chunk in range(len(tokens)):
        first, end = max(8 * (chunk + 1) - config.data.window, 0), 8 * (chunk + 1)
        logits = apply(params, inputs[None, first:end])[0, -8:]
        due = -jax.nn.log_softmax(logits)[jnp.arange(8), tokens[chunk]]
        np.testing.assert_allclose(nats[chunk], due, atol=1e-4)


def test_isolated_windows_see_nothing_else(held):
    _, task, params, batches = held
    score = jax.jit(task.heads(cache="isolated")["score"])
    x = batches[1].x
    changed = {**x, "tokens": x["tokens"].copy()}
    changed["tokens"][:, 0, 3] += 1  # of the first window of 12
    first, second = (np.asarray(score(params, batch)).reshape(2, -1) for batch in (x, changed))
    assert (first[:, :12] != second[:, :12]).any()
    np.testing.assert_array_equal(first[:, 12:], second[:, 12:])


def built(label, config, task, params, **changes):
    config = config.copy_and_resolve_references()
    config.methods[label].update(changes)
    made = settings.candidates(config, task)[label][0]
    bound = made.bind(params, 0)
    return made, bound.build(bound.values)


def test_a_step_size_of_zero_is_the_control(held):
    config, task, params, batches = held
    _, still = built("still", config, task, params, select="lora")
    keys = ttt.sample_keys(jax.random.key(0), batches[1].id)
    output, info = jax.jit(ttt.batched(still))(params, batches[1].x, keys)
    # Compiled apart, the two programs may round apart.
    score = jax.jit(task.heads()["score"])
    np.testing.assert_allclose(output, score(params, batches[1].x), atol=2e-6)
    assert info.ok.all() and not info.updated.any()


def test_an_adapter_that_all_share(held):
    """Of one document it learns what document_ttt learns; it is not pristine at the next one."""
    config, task, params, batches = held
    changes = {"optimizer": "sgd", "select": "lora", "learning_rate": (1.0,)}
    made, shared = built("shared", config, task, params, **changes)
    _, apart = built("document_ttt", config, task, params, **changes)
    x = jax.tree.map(lambda leaf: leaf[:1], batches[1].x)
    step = jax.jit(shared.method.step)
    carry, (nats, info) = step(params, shared.method.init(params), x, jax.random.key(0))
    alone, _ = jax.jit(apart)(params, jax.tree.map(lambda leaf: leaf[0], x), jax.random.key(0))
    np.testing.assert_allclose(nats[0], alone, atol=1e-5)
    _, (again, _) = step(params, carry, x, jax.random.key(0))
    assert made.scope == "stream" and info.ok and bool((again[:, 0] != nats[:, 0]).any())


def test_another_documents_adapter(held):
    config, task, params, batches = held
    changes = {"optimizer": "sgd", "select": "lora", "learning_rate": 1.0}
    made, crossed = built("crossed", config, task, params, **changes)
    x, key, select = batches[1].x, jax.random.key(0), ttt.select.lora()
    output, info = jax.jit(crossed.method)(params, x, key)
    learn = ttt.methods.document_adapter(
        task.heads()["read"], optimizer=optax.sgd(1.0), select=select, bos=0
    )
    first, second = (jax.tree.map(lambda leaf, r=row: leaf[r], x) for row in range(2))
    adapter, _ = jax.jit(learn)(params, first, key)
    adapted = select.merge(adapter, select.split(params)[1])
    due = jax.jit(task.heads()["score"])(adapted, jax.tree.map(lambda leaf: leaf[None], second))
    np.testing.assert_allclose(output[1], due[0], atol=1e-5)
    assert made.scope == "batch" and bool(info.updated)
    with pytest.raises(ValueError, match="at least two documents"):
        crossed.method(params, jax.tree.map(lambda leaf: leaf[:1], x), key)


def test_a_pretrained_folder_goes_through_the_programs(tmp_path):
    config = documents_pretrained.get_config()
    tiny_decoder.stand_in(config, tmp_path)
    other = tiny_decoder.write_texts(tmp_path / "other.jsonl", (30, 41, 60), seed=7)
    config.data.reported = (*config.data.reported, other)
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
    methods = ("recomputed", "source", "document_ttt")
    streams = ("reported", "other")
    assert {*lines.index} == {(stream, name) for stream in streams for name in methods}
    # Documents of one stream are not those of another, however many there are.
    source = data.rows().query("method == 'source'")
    first, second = data.replicates["bits_per_byte"][source.index]
    assert (first != second).any()
    assert (lines["documents"] == "3").all() and lines["saved, median (%)"].notna().all()
    shown = report_documents.shown_passages(tmp_path / "run", [])
    names = {(document["stream"], document["name"]) for document in shown}
    assert names == {(stream, f"title {k}") for stream in streams for k in range(3)}
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
