"""Losses on the features of a layer, in NumPy: denoising, NT-Xent, TTT++ and ActMAD.

As those of ``golden``, on the model with one shared layer: value and gradient by hand, in float64.
"""

import numpy as np

from .golden import dense, shared, softmax, through_head, through_shared


def added(*gradients):
    """The sum over the losses that reach a leaf."""
    names = [name for gradient in gradients for name in gradient]
    return {name: sum(g[name] for g in gradients if name in g) for name in dict.fromkeys(names)}


def denoising(p, noisy, clean):
    """``mean |D(noisy) - clean|^2`` over all pixels (Vincent et al. 2008)."""
    error = dense(p, "decoder", shared(p, noisy)) - clean.reshape(len(clean), -1)
    return np.square(error).mean(), through_head(p, "decoder", noisy, 2 * error / error.size)


def nt_xent(p, views, temperature, bank=None):
    """Cross-entropy of every view to its partner among all others (Chen et al. 2020, Eq. 1).

    Views 2n and 2n + 1 are partners. The gradient of a direction loses what lies along the vector.
    """
    vectors = dense(p, "projection", shared(p, views))
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit, count = vectors / lengths, len(views)
    others = unit
    if bank is not None:
        others = np.concatenate([unit, bank / np.linalg.norm(bank, axis=1, keepdims=True)])
    logits = unit @ others.T / temperature
    logits[np.arange(count), np.arange(count)] = -np.inf
    probability = softmax(logits)
    partner = (np.arange(count), np.arange(count) ^ 1)
    value = -np.log(probability[partner]).mean()
    slope = probability / (count * temperature)
    slope[partner] -= 1 / (count * temperature)
    # A view is compared with the others, and the others with it.
    of_unit = slope @ others + slope[:, :count].T @ unit
    of_vector = (of_unit - unit * (unit * of_unit).sum(axis=1, keepdims=True)) / lengths
    return value, through_head(p, "projection", views, of_vector)


# TTT++ (Liu et al. 2021): NT-Xent, and the moments at the encoder and at the head.

PLACES = ("encoder", "head")


def features(p, images):
    """At both places."""
    hidden = shared(p, images)
    return {"encoder": hidden, "head": dense(p, "projection", hidden)}


def moments(rows):
    return rows.mean(axis=0), np.cov(rows.T, ddof=0)


def distance(current, queue, source, mean_weight, covariance_weight):
    """``w_c |S - S_src|_F^2 / (4 D^2) + w_m / 2 mean((mu - mu_src)^2)``, and the slope of current.

    Over queue and current rows; the queue is a constant, and S divides by n - 1.
    """
    rows = np.concatenate([queue, current])
    count, width = rows.shape
    mean, covariance = source
    centered = rows - rows.mean(axis=0)
    gap = centered.T @ centered / (count - 1) - covariance
    off = rows.mean(axis=0) - mean
    value = covariance_weight * np.square(gap).sum() / (4 * width**2)
    value += mean_weight / 2 * np.square(off).mean()
    slope = covariance_weight * centered @ gap / (width**2 * (count - 1))
    slope += mean_weight * off / (width * count)
    return value, slope[len(queue) :]


def ttt_plus(p, images, views, queues, sources, temperature, weights):
    """``weights[place]``: of the distance, of its mean and of its covariance."""
    value, gradient = nt_xent(p, views, temperature)
    found, slopes = features(p, images), {}
    for place in PLACES:
        weight, *inner = weights[place]
        far, slope = distance(found[place], queues[place], sources[place], *inner)
        value, slopes[place] = value + weight * far, weight * slope
    return value, added(
        gradient,
        through_shared(p, images, slopes["encoder"]),
        through_head(p, "projection", images, slopes["head"]),
    )


# ActMAD (Mirza et al. 2023): the layers are the shared one and the decoder's map.


def activations(p, images):
    hidden = shared(p, images)
    return hidden, dense(p, "decoder", hidden)


def activation_matching(p, views, source):
    """``1/2 sum_l mean|mu - mu_src| + mean|var - var_src|``; the variance divides by n - 1."""
    value, slopes = 0.0, []
    for layer, (mean, variance) in zip(activations(p, views), source, strict=True):
        count, size = layer.shape
        centered = layer - layer.mean(axis=0)
        off, gap = layer.mean(axis=0) - mean, layer.var(axis=0, ddof=1) - variance
        # In float32 every sign must be the one that it is here.
        assert min(np.abs(off).min(), np.abs(gap).min()) > 1e-5
        value += (np.abs(off).mean() + np.abs(gap).mean()) / 2
        slope = np.sign(off) / count + 2 * np.sign(gap) * centered / (count - 1)
        slopes.append(slope / (2 * size))
    hidden, decoded = slopes
    return value, added(
        through_shared(p, views, hidden), through_head(p, "decoder", views, decoded)
    )
