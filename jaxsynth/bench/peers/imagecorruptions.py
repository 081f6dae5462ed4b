"""ImageNet-C by imagecorruptions. Imported only for --peer=imagecorruptions."""

import warnings
from collections.abc import Sequence

import jax
import numpy as np

from jaxsynth.bench.timing import cores
from jaxsynth.core.errors import UserError

try:
    with warnings.catch_warnings():
        # It imports pkg_resources, which says that it goes away.
        warnings.simplefilter("ignore")
        import cv2  # pyrefly: ignore[missing-import]
        import imagecorruptions  # pyrefly: ignore[missing-import]
except ImportError as error:
    raise UserError(
        f"--peer=imagecorruptions needs imagecorruptions: {error.name} is not installed "
        "(pip install 'setuptools<81' opencv-python-headless scikit-image numba; pip install "
        "--no-deps git+https://github.com/bethgelab/imagecorruptions: on today's NumPy and "
        "scikit-image the release on PyPI fails on several corruptions)"
    ) from error


def prepare() -> dict[str, str]:
    """Gives OpenCV every core this process may use; returns the versions."""
    if jax.default_backend() != "cpu":
        raise UserError(
            "--peer=imagecorruptions compares on the CPU, but JAX runs on "
            f"{jax.default_backend()}: set JAX_PLATFORMS=cpu"
        )
    cv2.setNumThreads(len(cores()))
    from importlib.metadata import version

    return {name: version(name) for name in ("imagecorruptions", "scikit-image")}


class Imagecorruptions:
    """Corrupts one image at a time."""

    def __init__(self, corruptions: Sequence[str], severity: int):
        self._severity = severity
        blank = np.full((64, 64, 3), 128, np.uint8)
        for name in corruptions:
            try:
                self.corrupt(name, blank)
            except (AttributeError, TypeError) as error:
                raise UserError(
                    f"--peer=imagecorruptions: its {name} does not run here ({error}); install "
                    "its source: pip install --no-deps --force-reinstall "
                    "git+https://github.com/bethgelab/imagecorruptions"
                ) from error

    def corrupt(self, name: str, image: np.ndarray) -> np.ndarray:
        """uint8 (h, w, 3) of an image like that."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return imagecorruptions.corrupt(image, self._severity, corruption_name=name)
