"""Methods in NumPy: models, losses, gradients and optimizers written out by hand.

All in float64 and from the papers' formulas; nothing here knows of jax or of the library.
Parameters are flat dicts, ``"module/leaf" -> array``. A loss returns its value and its gradient
with respect to the leaves that adapt.
"""

import numpy as np

EPSILON = 1e-5
PATCH = 2


def flat(tree):
    """A dict of modules as a flat dict in float64, without the holes of a selection."""
    return {
        f"{module}/{name}": np.asarray(leaf, np.float64)
        for module, leaves in tree.items()
        for name, leaf in leaves.items()
        if leaf is not None
    }


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def dense(p, name, inputs):
    return inputs @ p[f"{name}/kernel"] + p[f"{name}/bias"]


# Two heads on one shared layer: rotation (Sun et al. 2020) and MEMO (Zhang et al. 2022).


def shared(p, images):
    return np.tanh(dense(p, "shared", images.reshape(len(images), -1)))


def classify(p, images):
    return dense(p, "classes", shared(p, images))


def through_shared(p, images, slope):
    """Gradient of the shared layer, from that of its output."""
    below = slope * (1 - shared(p, images) ** 2)
    return {
        "shared/kernel": images.reshape(len(images), -1).T @ below,
        "shared/bias": below.sum(axis=0),
    }


def through_head(p, head, images, slope):
    """Gradient of a head and of the shared layer, from that of the head's logits."""
    return {
        f"{head}/kernel": shared(p, images).T @ slope,
        f"{head}/bias": slope.sum(axis=0),
        **through_shared(p, images, slope @ p[f"{head}/kernel"].T),
    }


def rotation(p, views, turns):
    """``mean_j CE(g(e(view_j)), r_j)``; the slope of each logit is ``(p - onehot) / N``."""
    probability = softmax(dense(p, "rotation", shared(p, views)))
    value = -np.log(probability[np.arange(len(turns)), turns]).mean()
    slope = (probability - np.eye(4)[turns]) / len(turns)
    return value, through_head(p, "rotation", views, slope)


def marginal_entropy(p, views):
    """``H(m)`` of the mean probability m, with ``dH/dm = -(log m + 1)``."""
    probability = softmax(classify(p, views))
    mean = probability.mean(axis=0)
    outer = -(np.log(mean) + 1)
    inner = probability * (outer - (probability @ outer)[:, None])
    return -(mean * np.log(mean)).sum(), through_head(p, "classes", views, inner / len(views))


# An encoder of visible patches, a decoder and a head: TTT-MAE (Gandelsman et al. 2022).


def patches(image):
    rows, columns = range(0, image.shape[0], PATCH), range(0, image.shape[1], PATCH)
    return np.stack([image[i : i + PATCH, j : j + PATCH].ravel() for i in rows for j in columns])


def encode(p, image, keep):
    """``keep[V, K]``: the K visible patches of each of V masks."""
    tokens = patches(image)[keep]
    return tokens, np.tanh(tokens @ p["encoder/kernel"] + p["encoder/position"][keep])


def classify_patches(p, image):
    """With every patch visible."""
    _, hidden = encode(p, image, np.arange(len(patches(image)))[None])
    return dense(p, "head", hidden.mean(axis=1))[0]


def reconstruction(p, image, keep):
    """Mean over masks, hidden patches and pixels of ``|D(E(visible)) - normalized patch|^2``."""
    target = patches(image)
    spread = np.sqrt(target.var(axis=1, ddof=1, keepdims=True) + 1e-6)
    target = (target - target.mean(axis=1, keepdims=True)) / spread
    tokens, hidden = encode(p, image, keep)
    output = dense(p, "decoder", hidden.mean(axis=1)).reshape(len(keep), *target.shape)
    masked = np.ones((len(keep), len(target), 1))
    for mask, visible in zip(masked, keep, strict=True):
        mask[visible] = 0
    error = (output - target) * masked
    count = masked.sum() * target.shape[1]
    pooled = (2 * error / count).reshape(len(keep), -1) @ p["decoder/kernel"].T
    below = pooled[:, None] / keep.shape[1] * (1 - hidden**2)
    position = np.zeros_like(p["encoder/position"])
    np.add.at(position, keep, below)
    gradient = {
        "encoder/kernel": np.einsum("vkd,vkw->dw", tokens, below),
        "encoder/position": position,
    }
    return np.square(error).sum() / count, gradient


# Two layers, each normalized by the statistics of its batch: Tent (Wang et al. 2021).


def standardize(rows):
    deviation = np.sqrt(rows.var(axis=0) + EPSILON)
    return (rows - rows.mean(axis=0)) / deviation, deviation


def batch_normalized(p, rows):
    first, _ = standardize(rows @ p["dense1/kernel"])
    lower = np.tanh(first * p["norm1/scale"] + p["norm1/bias"])
    second, deviation = standardize(lower @ p["dense2/kernel"])
    upper = np.tanh(second * p["norm2/scale"] + p["norm2/bias"])
    return dense(p, "head", upper), (first, lower, second, deviation, upper)


def entropy(p, rows):
    """``mean_i H(p_i)``; the slope of each logit is ``-p (log p + H) / N``."""
    logits, (first, lower, second, deviation, upper) = batch_normalized(p, rows)
    probability = softmax(logits)
    each = -(probability * np.log(probability)).sum(axis=1, keepdims=True)
    slope = -probability * (np.log(probability) + each) / len(rows)
    above = (slope @ p["head/kernel"].T) * (1 - upper**2)
    # Back through the second normalization, whose mean and variance depend on every row.
    inner = above * p["norm2/scale"]
    inner = inner - inner.mean(axis=0) - second * (inner * second).mean(axis=0)
    below = (inner / deviation @ p["dense2/kernel"].T) * (1 - lower**2)
    gradient = {
        "norm1/scale": (below * first).sum(axis=0),
        "norm1/bias": below.sum(axis=0),
        "norm2/scale": (above * second).sum(axis=0),
        "norm2/bias": above.sum(axis=0),
    }
    return each.mean(), gradient


# Optimizers: the leaves without a gradient are frozen. A fresh one has an empty state.


class SGD:
    """As PyTorch has it: decay adds to the gradient, and momentum takes in both."""

    def __init__(self, rate, momentum=0.0, nesterov=False, decay=0.0):
        self.rate, self.momentum, self.velocity = rate, momentum, {}
        self.nesterov, self.decay = nesterov, decay

    def step(self, p, gradient):
        moved = {}
        for name, slope in gradient.items():
            slope = slope + self.decay * p[name]
            velocity = self.momentum * self.velocity.get(name, 0.0) + slope
            self.velocity[name] = velocity
            ahead = slope + self.momentum * velocity if self.nesterov else velocity
            moved[name] = p[name] - self.rate * ahead
        return p | moved


class Adam:
    def __init__(self, rate, decay=0.9, decay_of_squares=0.999, epsilon=1e-8):
        self.rate, self.b1, self.b2, self.epsilon = rate, decay, decay_of_squares, epsilon
        self.mean, self.square, self.count = {}, {}, 0

    def step(self, p, gradient):
        self.count += 1
        moved = {}
        for name, slope in gradient.items():
            mean = self.b1 * self.mean.get(name, 0.0) + (1 - self.b1) * slope
            square = self.b2 * self.square.get(name, 0.0) + (1 - self.b2) * slope**2
            self.mean[name], self.square[name] = mean, square
            mean = mean / (1 - self.b1**self.count)
            square = square / (1 - self.b2**self.count)
            moved[name] = p[name] - self.rate * mean / (np.sqrt(square) + self.epsilon)
        return p | moved


def adapt(p, loss, optimizer, steps):
    """Adapted parameters, and loss and gradient norm before each step on ``loss(p, *data)``."""
    values, norms = [], []
    for data in steps:
        value, gradient = loss(p, *data)
        values.append(value)
        norms.append(np.sqrt(sum((slope**2).sum() for slope in gradient.values())))
        p = optimizer.step(p, gradient)
    return p, values, norms


def slopes(loss, p, names, *data, width=1e-5):
    """Central differences of ``loss(p, *data)[0]`` in the named leaves."""

    def moved(name, place, by):
        leaf = p[name].copy()
        leaf[place] += by
        return loss(p | {name: leaf}, *data)[0]

    found = {name: np.zeros_like(p[name]) for name in names}
    for name, leaf in found.items():
        for place in np.ndindex(leaf.shape):
            leaf[place] = (moved(name, place, width) - moved(name, place, -width)) / (2 * width)
    return found


# How results of the library, float32, are compared.


def close(actual, expected, name=""):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5, err_msg=name)


def same_weights(tree, p):
    """Those leaves that a tree of the library holds."""
    for name, leaf in flat(tree).items():
        close(leaf, p[name], name)


def same_steps(info, values, norms):
    close(info.loss, values, "loss")
    close(info.grad_norm, norms, "norm of the gradient")
    assert info.ok and info.updated


def adapted(source, p, names, least):
    """The named leaves moved, each by much more than the tolerance, and no other."""
    gaps = {name: np.abs(p[name] - leaf).max() for name, leaf in source.items()}
    assert {name for name, gap in gaps.items() if gap > 0} == set(names)
    assert min(gaps[name] for name in names) > least


def same_slopes(loss, p, *data):
    """The gradient by hand against central differences of the value by hand."""
    _, gradient = loss(p, *data)
    for name, slope in slopes(loss, p, gradient, *data).items():
        np.testing.assert_allclose(gradient[name], slope, rtol=1e-6, atol=1e-9, err_msg=name)
