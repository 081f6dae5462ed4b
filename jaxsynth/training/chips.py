"""TPU chips and their slices, for plans of machines that are not here.

A topology is a kind and a shape, `v5e:4x4`. The TPU compiler (libtpu) needs no TPU.
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from jaxsynth.core.errors import UsageError


@dataclass(frozen=True)
class Chip:
    """What one chip has.

    Args:
        memory: bytes of HBM that the compiler gives to a program.
        flops: peak bfloat16 operations a second; float32 products take this form by default.
        bandwidth: HBM, bytes a second.
        links: bytes a second that a chip receives from its neighbors, all links together.
        most: chips of the largest slice.
        shapes: slices on offer, the smallest first.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    links: float
    most: int
    shapes: tuple[str, ...]


_TWO_AXES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# Peak, bandwidths and shapes: cloud.google.com/tpu/docs/v5e, v5p and v6e, read in November 2026;
# of the links, which it states for both directions together, half. Memory: what libtpu 0.0.42.1
# says is available when a program does not fit.
CHIPS = {
    "v5e": Chip("v5e", 15.75 * 2**30, 197e12, 819e9, 200e9, 256, _TWO_AXES),
    "v6e": Chip("v6e", 31.25 * 2**30, 918e12, 1638e9, 400e9, 256, _TWO_AXES),
    "v5p": Chip(
        "v5p", 95.74 * 2**30, 459e12, 2765e9, 600e9, 6144,
        ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
    ),
}  # fmt: skip


_NO_MACHINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    # Nor does a second compiler beside the first need the chip that both would else ask for.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


def slice_of(topology: str) -> tuple[Chip, Sequence[jax.Device]]:
    """The chip and the devices of a slice such as `v5e:4x4`, for the compiler alone.

    Raises:
        UsageError: the topology is none, or the compiler is not installed.
    """
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS:
        raise UsageError(
            f"--topology={topology}: no such chip, expected KIND:SHAPE with one of "
            f"{', '.join(CHIPS)}, such as v5e:4x4"
        )
    chip = CHIPS[kind]
    wrong = UsageError(
        f"--topology={topology}: no such slice, expected {kind}: and one of "
        f"{', '.join(chip.shapes)}"
    )
    sizes = [int(size) for size in re.findall(r"[1-9]\d*", shape)]
    if "x".join(map(str, sizes)) != shape or len(sizes) != chip.shapes[0].count("x") + 1:
        raise wrong
    # Of three axes there are more than the common ones, which the compiler knows.
    if math.prod(sizes) > chip.most or (len(sizes) == 2 and shape not in chip.shapes):
        raise wrong
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            f"--topology={topology}: the TPU compiler is not installed; "
            "pip install 'jaxsynth[tpu]' (it needs no TPU)"
        )
    from jax.experimental import topologies

    # Else libtpu asks the cloud's metadata server which machine this is, and complains.
    for name, value in _NO_MACHINE.items():
        os.environ.setdefault(name, value)
    more = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sizes) == 1 else {}
    try:
        found = topologies.get_topology_desc(topology, "tpu", **more)
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise wrong from error
    return chip, found.devices
