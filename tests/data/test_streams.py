import numpy as np
import pytest

from ttt_jax.data import streams


def every_index_once(plan, count):
    assert sorted(plan.index.tolist()) == list(range(count))


def concentration(plan, labels, window=40):
    """Mean share of the most frequent class in consecutive windows: 0.1 is even, 1 is pure."""
    order = labels[plan.index]
    starts = range(0, len(order) - window + 1, window)
    return np.mean([np.bincount(order[s : s + window]).max() / window for s in starts])


def test_every_stream_has_every_example_once(digits):
    for plan in (
        streams.sequential(digits),
        streams.shuffled(digits, seed=0),
        streams.sorted_by_label(digits, seed=0),
        streams.dirichlet(digits, gamma=0.1, seed=0),
        streams.gradual(digits, "fog", seed=0),
    ):
        every_index_once(plan, 360)
        assert plan.index.dtype == np.int64 and plan.severity.dtype == np.int32
        assert len(plan.domain) == len(plan.severity) == 360
    assert set(streams.sequential(digits).domain) == {"clean"}
    np.testing.assert_array_equal(streams.sequential(digits).index, np.arange(360))


def test_seeds(digits):
    for make in (streams.shuffled, streams.sorted_by_label):
        np.testing.assert_array_equal(make(digits, seed=3).index, make(digits, seed=3).index)
        assert (make(digits, seed=3).index != make(digits, seed=4).index).any()
    clean = streams.shuffled(digits, seed=1)
    foggy = streams.shuffled(digits, seed=1, domain="fog", severity=2)
    np.testing.assert_array_equal(clean.index, foggy.index)
    assert set(foggy.domain) == {"fog"} and set(foggy.severity) == {2}


def test_sorted_by_label_has_one_run_per_class(digits):
    order = digits.labels()[streams.sorted_by_label(digits, seed=5).index]
    assert np.count_nonzero(np.diff(order)) == 9
    assert list(dict.fromkeys(order.tolist())) != list(range(10))


def test_smaller_gamma_is_more_correlated(digits):
    labels = digits.labels()
    share = [
        np.mean(
            [
                concentration(streams.dirichlet(digits, gamma=gamma, seed=s), labels)
                for s in range(5)
            ]
        )
        for gamma in (1e-3, 0.1, 1.0, 100.0)
    ]
    assert share[0] > share[1] > share[2] > share[3]
    assert share[0] > 0.65
    even = concentration(streams.shuffled(digits, seed=0), labels)
    pure = concentration(streams.sorted_by_label(digits, seed=0), labels)
    # 36 of each class: a window of 40 is at best nine tenths pure.
    assert even < 0.3 and share[3] < 0.25 and pure > share[1]


def test_domains_in_sequence(digits):
    plans = [
        streams.shuffled(digits, seed=0, domain=name, severity=5) for name in ("snow", "contrast")
    ]
    joined = streams.domains_in_sequence([*plans, streams.sequential(digits)])
    assert joined.domain.tolist() == ["snow"] * 360 + ["contrast"] * 360 + ["clean"] * 360
    np.testing.assert_array_equal(joined.index[360:720], plans[1].index)
    assert joined.severity[[0, 400, -1]].tolist() == [5, 5, 0]


def test_mixed_interleaves_and_keeps_inner_order(digits):
    plans = [
        streams.dirichlet(digits, gamma=0.1, seed=1, domain="snow", severity=5),
        streams.shuffled(digits, seed=2, domain="contrast", severity=3),
    ]
    both = streams.mixed(plans, seed=0)
    for plan in plans:
        mine = both.domain == plan.domain[0]
        np.testing.assert_array_equal(both.index[mine], plan.index)
        assert set(both.severity[mine]) == {plan.severity[0]}
    changes = np.count_nonzero(both.domain[1:] != both.domain[:-1])
    assert 300 < changes < 420  # fair coin tosses change about every second time


def test_gradual_climbs_and_falls(digits):
    severity = streams.gradual(digits, "frost", seed=0).severity
    assert severity[np.flatnonzero(np.diff(severity, prepend=0))].tolist() == [
        1, 2, 3, 4, 5, 4, 3, 2, 1,
    ]  # fmt: skip
    assert np.bincount(severity).tolist() == [0, 80, 80, 80, 80, 40]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domain": "snw", "severity": 3}, "snow"),
        ({"domain": "snow", "severity": 0}, "from 1"),
        ({"domain": "clean", "severity": 3}, "severity 0"),
    ],
)
def test_bad_domains(digits, options, message):
    with pytest.raises(ValueError, match=message):
        streams.sequential(digits, **options)


def test_other_bad_input(digits):
    for gamma in (0, -1.0, np.nan):
        with pytest.raises(ValueError, match="gamma"):
            streams.dirichlet(digits, gamma=gamma, seed=0)
    with pytest.raises(ValueError, match="num_slots"):
        streams.dirichlet(digits, gamma=1.0, seed=0, num_slots=0)
    with pytest.raises(ValueError, match="at least one plan"):
        streams.domains_in_sequence([])
    with pytest.raises(ValueError, match="no corruption"):
        streams.gradual(digits, "clean", seed=0)
