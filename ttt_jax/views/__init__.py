"""Random views of one test instance, as pure functions ``(x, key) -> x``.

* :mod:`image`: shift, flip, crop, color, and fixed sets of views
* :mod:`augmix`: mixtures of chains of Pillow's operations (MEMO)

They are the ``augment`` of :mod:`ttt_jax.methods`, :mod:`ttt_jax.losses` and
:func:`ttt_jax.augmented`, and cost jax alone.
"""

from ttt_jax.views import augmix, image

__all__ = ["augmix", "image"]
