"""Passages of a corpus: features, SIFT by brute force, clusters, and what must not be in it."""

import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax import audit, neighbors, passages

from .compiling import quickly

RNG = np.random.default_rng(0)
BANK = (RNG.normal(size=(30, 6)) + 0.5).astype(np.float32)
QUERY = (RNG.normal(size=6) + 0.5).astype(np.float32)
TOKENS = RNG.integers(1000, size=(5, 12)).astype(np.int32)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def by_brute_force(query, bank, k, noise):
    """The posterior variance after every possible next choice, each by a solve in float64."""
    rows, query = unit(bank.astype(np.float64)), unit(query.astype(np.float64))
    chosen = []
    for _ in range(k):
        variances = []
        for index in range(len(rows)):
            seen = rows[[*chosen, index]]
            covariance = seen @ seen.T + noise * np.eye(len(seen))
            variances.append(1 - (seen @ query) @ np.linalg.solve(covariance, seen @ query))
        chosen.append(int(np.argmin(variances)))
    return chosen


class TestSift:
    @pytest.mark.parametrize("noise", [0.01, 0.3, 10.0])
    def test_by_brute_force(self, noise):
        found = quickly(lambda q, b: passages.sift(q, b, 6, noise=noise), QUERY, BANK)
        assert list(found) == by_brute_force(QUERY, BANK, 6, noise)

    def test_copies_are_not_taken_twice_where_the_nearest_would(self):
        """Five copies of the nearest row: one of them says it all."""
        nearest = int(neighbors.nearest(QUERY, BANK, 1)[0])
        bank = np.concatenate([BANK, np.repeat(BANK[nearest : nearest + 1], 5, 0)])
        copies = {nearest, *range(30, 35)}

        def both(bank):
            return passages.sift(QUERY, bank, 4), neighbors.nearest(QUERY, bank, 4)

        chosen, near = quickly(both, bank)
        assert len(copies & set(near.tolist())) == 4
        assert [place in copies for place in chosen.tolist()] == [True, False, False, False]

    def test_candidates_and_damaged_rows(self):
        bank = BANK.copy()
        best = by_brute_force(QUERY, BANK, 1, 0.01)[0]
        bank[best, 0] = np.nan

        def both(bank):
            return passages.sift(QUERY, bank, 5), passages.sift(QUERY, bank, 5, candidates=1)

        found, alone = quickly(both, bank)
        kept = np.delete(np.arange(30), best)
        assert list(found) == [kept[place] for place in by_brute_force(QUERY, BANK[kept], 5, 0.01)]
        assert len(set(alone.tolist())) == 1 and alone[0] == found[0]

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"features \[D\] of one.*\(1, 6\)"):
            passages.sift(QUERY[None], BANK, 2)
        with pytest.raises(ValueError, match="noise"):
            passages.sift(QUERY, BANK, 2, noise=0.0)


class TestTokenCounts:
    def test_shares_of_tokens(self):
        """With many places no two tokens meet: the Bhattacharyya coefficient, by hand."""
        tokens = np.array([[3, 3, 5, 9], [5, 3, 3, 700], [8, 8, 8, 8]], np.int32)
        mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], np.float32)
        features = passages.token_counts(1 << 14)

        def products(tokens, mask):
            rows = features(None, {"tokens": tokens, "mask": mask})
            return rows @ rows.T, rows

        gram, rows = quickly(products, tokens, mask)
        between = np.sqrt(2 / 3 * 2 / 4) + np.sqrt(1 / 3 * 1 / 4)
        np.testing.assert_allclose(gram, [[1, between, 0], [between, 1, 0], [0, 0, 0]], atol=1e-6)
        np.testing.assert_allclose(np.sort(rows[0])[-2:] ** 2, [1 / 3, 2 / 3], rtol=1e-5)

    def test_tokens_are_spread(self):
        """Neighboring ids, which a vocabulary orders by frequency, fall into many places."""
        rows = passages.token_counts(256)(None, jnp.arange(256)[None])
        assert (np.asarray(rows) > 0).sum() > 130

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"\[N, P\]; got shape \(12,\)"):
            passages.token_counts()(None, TOKENS[0])
        with pytest.raises(ValueError, match="size"):
            passages.token_counts(1)


class TestClusters:
    def test_directions_are_told_apart(self):
        """Three bundles of directions, of any length, and their unit means."""
        centers = np.eye(3, 5)
        rows = np.repeat(centers, 4, 0) + 0.05 * RNG.normal(size=(12, 5))
        rows = (rows * RNG.uniform(0.1, 9, size=(12, 1))).astype(np.float32)
        found = passages.cluster(rows, 3)
        assert [len(set(found.labels[4 * i : 4 * i + 4])) for i in range(3)] == [1, 1, 1]
        assert len(set(found.labels)) == 3
        for index in range(3):
            mean = unit(unit(rows)[found.labels == index].mean(0))
            np.testing.assert_allclose(found.centers[index], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(passages.cluster(rows, 3).labels, found.labels)

    def test_sets_hold_their_passages_and_padding(self):
        pool = {"tokens": TOKENS, "mask": np.ones(TOKENS.shape, bool)}
        made = passages.in_clusters(pool, [0, 1, 0, 0, 2], size=2)
        assert made["tokens"].shape == made["mask"].shape == (3, 2, 12)
        first = {tuple(row) for row in made["tokens"][0]}
        assert len(first) == 2 and first <= {tuple(TOKENS[place]) for place in (0, 2, 3)}
        np.testing.assert_array_equal(made["tokens"][1:, 0], TOKENS[[1, 4]])
        assert made["mask"].any(-1).tolist() == [[True, True], [True, False], [True, False]]

    def test_bad_input(self):
        with pytest.raises(ValueError, match="at most the 5 rows"):
            passages.cluster(TOKENS, 6)
        with pytest.raises(ValueError, match=r"finite"):
            passages.cluster(np.full((3, 2), np.nan), 2)
        with pytest.raises(ValueError, match=r"labels must be one for each.*\(2,\), \(5, 12\)"):
            passages.in_clusters({"tokens": TOKENS, "mask": TOKENS}, [0, 1], size=2)
        with pytest.raises(ValueError, match=r"0 to C - 1 with a passage for each; got \[1, 2\]"):
            passages.in_clusters({"tokens": TOKENS, "mask": TOKENS}, [1, 2, 2, 1, 2], size=2)
        with pytest.raises(ValueError, match=r"'tokens' and 'mask'; got \['tokens'\]"):
            passages.in_clusters({"tokens": TOKENS}, np.zeros(5, int), size=2)


class TestApart:
    def test_a_document_in_the_corpus_is_found(self):
        """Across the borders of chunks, at any place of a passage; padding does not count."""
        documents = {"tokens": TOKENS[:3].reshape(3, 3, 4), "mask": np.ones((3, 3, 4))}
        (finding,) = audit.apart(documents, TOKENS[3:], length=6)
        assert finding.difference == 0
        leaked = np.concatenate([TOKENS[3], TOKENS[1, 2:9]])[None]
        with pytest.raises(audit.AuditError, match="difference 1"):
            audit.apart(documents, leaked, length=7)
        audit.apart(documents, leaked, length=8)
        documents["mask"][1, 1:] = 0
        audit.apart(documents, leaked, length=7 - 3)

    def test_nothing_to_compare_is_no_pass(self):
        with pytest.raises(ValueError, match="found none in the corpus"):
            audit.apart(TOKENS, TOKENS[:, :4], length=5)
        with pytest.raises(ValueError, match="found none in the documents"):
            audit.apart(TOKENS[:, :4], TOKENS, length=5)
        with pytest.raises(ValueError, match=r"documents must be integers.*float64"):
            audit.apart(np.ones((2, 3)), TOKENS, length=2)
        with pytest.raises(ValueError, match=r"mask shaped as its tokens.*\(5,\)"):
            audit.apart({"tokens": TOKENS, "mask": np.ones(5)}, TOKENS, length=2)
