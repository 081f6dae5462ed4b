"""What the backward pass computes again instead of keeping it (rematerialization), by name.

Sources: Chen et al. 2016 (arXiv 1604.06174); `jax.checkpoint`.
"""

from collections.abc import Callable
from typing import Any

import jax

# "block": nothing inside a block is kept. "dots": its matrix products are.
NAMES = ("block", "dots")
POLICIES = dict(
    zip(NAMES, (None, jax.checkpoint_policies.dots_with_no_batch_dims_saveable), strict=True)
)


def checkpointed(
    function: Callable[..., Any], remat: str | None, *, in_scan: bool = False
) -> Callable[..., Any]:
    """`function` with its inside computed again in the backward pass, as `remat` names; None: kept.

    `in_scan` says that it is the body of a scan, which is compiled on its own: nothing outside
    could undo the recomputation. ValueError for an unknown name.
    """
    if remat is None:
        return function
    if remat not in POLICIES:
        raise ValueError(f"remat: expected None or one of {sorted(POLICIES)}, got {remat!r}")
    return jax.checkpoint(function, prevent_cse=not in_scan, policy=POLICIES[remat])
