"""The backend that a program is traced for: the default one, or one that is not here.

Code that is fast on one backend and slow on another asks `backend()` while it is traced, and
`jaxsynth plan` compiles for a TPU on a machine that has none. The context is part of JAX's own
cache of traced programs, so one function may be traced for two backends in one process.
"""

import jax

_target = jax.make_user_context(default_value="")


def backend() -> str:
    """ "cpu", "gpu" or "tpu"."""
    return _target.value or jax.default_backend()


def compiling_for(platform: str):
    """A context in which programs are traced for `platform`."""
    return _target(platform)
