"""Selections: what is offered, what is chosen, and what is said when nothing is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax import select

from . import models


def leaf(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


PARAMS = {
    "params": {
        "encoder": {"kernel": leaf(4, 3), "bias": leaf(3)},
        "ln": {"scale": leaf(3), "bias": leaf(3)},
        "rms": {"scale": leaf(3)},
        "lora": {"kernel": leaf(3, 3), "kernel_lora_a": leaf(3, 1), "kernel_lora_b": leaf(1, 3)},
        "embed": {"embedding": leaf(5, 3), "scale": leaf(3)},
        "weight_norm": {"kernel": leaf(3, 3), "scale": leaf(3), "bias": leaf(3)},
        "quantized": {"kernel": leaf(3, 3, dtype=np.int8), "scale": leaf(3)},
    },
    "batch_stats": {"bn": {"mean": leaf(3), "var": leaf(3), "steps": leaf(dtype=np.int32)}},
}
NORMS = {"params/ln/scale", "params/ln/bias", "params/rms/scale"}


def chosen(selection, params=PARAMS):
    return set(select.describe(selection, params).paths)


class TestChoice:
    def test_paths_match_in_full(self):
        assert chosen(select.paths("params/ln/scale")) == {"params/ln/scale"}
        with pytest.raises(ValueError, match="ln/scale"):
            chosen(select.paths("ln/scale"))

    def test_paths_union_of_patterns(self):
        selection = select.paths(r".*/ln/.*", r".*encoder/bias")
        assert chosen(selection) == {"params/ln/scale", "params/ln/bias", "params/encoder/bias"}

    def test_paths_stay_inside_params(self):
        assert all(path.startswith("params/") for path in chosen(select.paths(".*")))

    def test_plain_parameters_have_no_collection(self):
        params = {"encoder": {"kernel": leaf(2)}, "batch_stats": {"mean": leaf(2)}}
        assert chosen(select.everything(), params) == {"encoder/kernel", "batch_stats/mean"}

    def test_a_bare_params_leaf_counts_as_the_collection(self):
        params = {"params": leaf(2), "batch_stats": leaf(2)}
        assert chosen(select.everything(), params) == {"params"}

    def test_norm_affine(self):
        """Neither an embedding, nor a layer with a kernel, be it quantized, is a normalization."""
        assert chosen(select.norm_affine()) == NORMS

    def test_biases(self):
        assert chosen(select.biases()) == {
            "params/encoder/bias",
            "params/ln/bias",
            "params/weight_norm/bias",
        }

    def test_lora(self):
        assert chosen(select.lora()) == {"params/lora/kernel_lora_a", "params/lora/kernel_lora_b"}

    def test_everything_is_floating_and_inside_params(self):
        paths = chosen(select.everything())
        assert "params/quantized/kernel" not in paths
        assert len(paths) == 14 and all(path.startswith("params/") for path in paths)

    def test_statistics(self):
        assert chosen(select.statistics()) == {"batch_stats/bn/mean", "batch_stats/bn/var"}

    def test_union_and_exclude(self):
        assert chosen(select.union(select.norm_affine(), select.lora())) == NORMS | chosen(
            select.lora()
        )
        assert chosen(select.exclude(select.norm_affine(), select.biases())) == {
            "params/ln/scale",
            "params/rms/scale",
        }
        rest = select.exclude(select.everything(), select.norm_affine(), select.lora())
        assert chosen(rest) == chosen(select.everything()) - NORMS - chosen(select.lora())

    def test_union_with_statistics(self):
        both = select.union(select.norm_affine(), select.statistics())
        assert chosen(both) == NORMS | chosen(select.statistics())

    def test_key_leaves_are_not_offered(self):
        params = {"w": leaf(2), "key": jax.random.key(0), "count": leaf(dtype=np.uint32)}
        assert chosen(select.everything(), params) == {"w"}

    def test_narrow_floats_are_offered(self):
        params = {"w": jnp.ones(2, jnp.bfloat16)}
        assert chosen(select.everything(), params) == {"w"}

    def test_other_containers(self):
        params = [leaf(2), (leaf(1), {"bias": leaf(3)})]
        assert chosen(select.paths("1/.*"), params) == {"1/0", "1/1/bias"}
        assert chosen(select.biases(), params) == {"1/1/bias"}


SELECTIONS = {
    "paths": select.paths(".*kernel"),
    "norm_affine": select.norm_affine(),
    "biases": select.biases(),
    "everything": select.everything(),
    "lora": select.lora(),
    "statistics": select.statistics(),
    "union": select.union(select.lora(), select.biases()),
    "exclude": select.exclude(select.everything(), select.biases()),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_merge_inverts_split(name):
    """The very same leaves come back, each from exactly one of the two trees."""
    params = {**PARAMS, "empty": None}
    fast, frozen = SELECTIONS[name].split(params)
    assert len(jax.tree.leaves(fast)) + len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(params))
    merged = SELECTIONS[name].merge(fast, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    pairs = zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True)
    assert all(a is b for a, b in pairs)


def test_selection_works_on_shapes_and_under_tracing():
    shapes = jax.eval_shape(lambda: models.make_params())
    described = select.describe(select.lora(), shapes)
    assert described == select.describe(select.lora(), models.make_params())

    def halve(params):
        fast, frozen = select.lora().split(params)
        return select.lora().merge(jax.tree.map(lambda a: a / 2, fast), frozen)

    assert jax.eval_shape(halve, shapes) == shapes


def test_describe():
    described = select.describe(select.norm_affine(), PARAMS)
    assert described.num_elements == 9
    assert described.num_bytes == 36
    assert described.total_elements == sum(a.size for a in jax.tree.leaves(PARAMS))
    text = str(described)
    assert text.splitlines()[0].startswith("3 arrays, 9 of ")
    assert "36 bytes per copy" in text and "  params/rms/scale" in text


class TestErrors:
    def test_a_pattern_without_a_match_names_the_nearest_paths(self):
        message = (
            r"at least one parameter.*'params/encoder/kernle'.*none of the 14.*"
            r"Nearest paths: params/encoder/kernel.*describe"
        )
        with pytest.raises(ValueError, match=message):
            select.paths("params/encoder/kernle").split(PARAMS)

    @pytest.mark.parametrize("pattern", ["encoder/kernel", r".*encodr/kernel", r"\.*encoder.kern$"])
    def test_wildcards_do_not_hide_the_nearest_path(self, pattern):
        with pytest.raises(ValueError, match="Nearest paths: params/encoder/kernel"):
            select.paths(pattern).split(PARAMS)

    def test_each_pattern_must_match(self):
        with pytest.raises(ValueError, match=r"pattern 'nothing/\.\*'"):
            select.paths(".*", "nothing/.*").split(PARAMS)

    def test_statistics_are_reached_by_statistics_only(self):
        with pytest.raises(ValueError, match=r"batch_stats/\.\*.*matches none"):
            select.paths("batch_stats/.*").split(PARAMS)

    @pytest.mark.parametrize("name", ["norm_affine", "biases", "lora", "statistics"])
    def test_named_selections_say_what_they_look_for(self, name):
        params = {"params": {"dense": {"kernel": leaf(2, 2)}}}
        with pytest.raises(ValueError, match=rf"at least one parameter; {name}\(\) \("):
            getattr(select, name)().split(params)

    def test_a_tree_without_floats(self):
        with pytest.raises(ValueError, match=r"without any floating-point leaf.*Pass the param"):
            select.everything().split({"steps": leaf(dtype=np.int32)})

    def test_no_pattern(self):
        with pytest.raises(ValueError, match=r"at least one pattern.*paths\('\.\*'\)"):
            select.paths()

    def test_not_a_regular_expression(self):
        with pytest.raises(ValueError, match=r"regular expressions; '\*' is not one"):
            select.paths("*")

    def test_empty_union(self):
        with pytest.raises(ValueError, match="at least one selection"):
            select.union()

    def test_nothing_left(self):
        with pytest.raises(ValueError, match=r"removed all of the 2.*Exclude fewer"):
            select.exclude(select.lora(), select.everything()).split(PARAMS)

    def test_an_exclusion_that_matches_nothing(self):
        with pytest.raises(ValueError, match="'typo'"):
            select.exclude(select.everything(), select.paths("typo")).split(PARAMS)


SLASHES = {
    "params": {
        "WeightNorm_0": {"Dense_1/kernel/scale": leaf(5), "Dense_1/kernel/bias": leaf(5)},
        "LayerNorm_0": {"scale": leaf(5), "bias": leaf(5)},
        "lora_a/x": {"kernel": leaf(2)},
    },
    "params/other": {"scale": leaf(2)},
}


class TestNamesWithSlashes:
    """What a module holds is read from the tree, not from the spelling of a name."""

    def chosen(self, selection):
        return select.describe(selection, SLASHES).paths

    def test_norm_affine(self):
        assert set(self.chosen(select.norm_affine())) == {
            "params/LayerNorm_0/scale",
            "params/LayerNorm_0/bias",
        }

    def test_biases(self):
        assert self.chosen(select.biases()) == ("params/LayerNorm_0/bias",)

    def test_collections(self):
        assert "params/other/scale" not in self.chosen(select.everything())

    def test_a_layer_scale_stays_chosen(self):
        params = {"layer_scale": {"scale": leaf(3)}}
        assert select.describe(select.norm_affine(), params).paths == ("layer_scale/scale",)


@pytest.mark.parametrize(
    "selection",
    [select.everything(), select.paths("layer/.*"), select.biases(), select.union(select.biases())],
)
def test_complex_leaves_are_not_left_out_in_silence(selection):
    name = f"bias_{id(selection)}"
    params = {"layer": {"bias": leaf(3)}, name: {"bias": leaf(3, dtype=np.complex64)}}
    params["layer"][name] = {"bias": leaf(2, dtype=np.complex64)}
    with pytest.warns(UserWarning, match=rf"also matches the complex .*{name}.*stay frozen"):
        description = select.describe(selection, params)
    assert description.paths == ("layer/bias",)
    assert f"complex: {name}/bias" in str(description)
