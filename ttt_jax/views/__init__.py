"""Views of one test instance.

Random ones, as pure functions ``(x, key) -> x``:

* :mod:`image`: shift, flip, crop, color, and fixed sets of views
* :mod:`augmix`: mixtures of chains of Pillow's operations (MEMO)

They are the ``augment`` of :mod:`ttt_jax.methods`, :mod:`ttt_jax.losses` and
:func:`ttt_jax.augmented`, and cost jax alone. Views with an inverse, on the host:

* :mod:`grid`: symmetries and colors of grids and of few-shot tasks
* :mod:`grid_arrays`: few-shot tasks under views as arrays, and answers mapped back
"""

from ttt_jax.views import augmix, grid, grid_arrays, image

__all__ = ["augmix", "grid", "grid_arrays", "image"]
