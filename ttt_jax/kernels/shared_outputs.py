"""What ``defvjp`` needs to be told for outputs that all instances of a ``vmap`` share.

In the first inner step all instances share the pristine weights, so a kernel's output may be shared
while its gradient is each instance's own. From jax 0.12 on such a backward rule is refused unless
it is declared to be right for any batch, as all rules here are; older releases know no such word.
"""

import inspect

import jax

DECLARED: dict[str, bool] = (
    {"generic_batching": True}
    if "generic_batching" in inspect.signature(jax.custom_vjp.defvjp).parameters
    else {}
)
