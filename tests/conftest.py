"""Settings of every test: eight fake CPU devices, one compilation cache, no network, few threads.

The environment is set before JAX, torch and the tokenizers are imported, because each of them reads
it once. The cache of compiled programs lies outside the tree and is shared by all runs: a second
run of the suite spends its time on the tests and not on XLA. Programs are compiled without LLVM's
optimisations, each in one piece (split for 32 threads, a denoiser's training step takes 36 s of CPU
in place of 30) and, where XLA still has it, by the older emitter of fused loops; products and
convolutions, which are calls into libraries, stay as fast as they are.
"""

import gc
import importlib.metadata
import os
import signal
from collections import Counter
from pathlib import Path

_FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
# An XLA that does not know a flag ends the process.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _FLAGS += ["--xla_cpu_use_fusion_emitters=false"]
for _flag in _FLAGS:
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
for _name, _value in {
    "JAX_PLATFORMS": "cpu",
    # Of processes that tests start too: JAX itself keeps what takes a second to compile.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    # Test processes side by side share the cores.
    "OMP_NUM_THREADS": "1" if "PYTEST_XDIST_WORKER" in os.environ else "2",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(_name, _value)

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402
from flax import nnx  # noqa: E402
from jaxtyping import config as shape_checks  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

import tests.shapes  # noqa: E402, F401  # the hook finds it by its name

# The rooms of arithmetic, before anything imports them.
_ROOMS = ("adapters", "diffusion", "models", "ops")
install_import_hook([f"jaxsynth.{room}" for room in _ROOMS], "tests.shapes.checked")

FAKE_DEVICES = 8
MOST_MAPS = 25_000
MOST_BYTES = 3 << 30
CACHE = (
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxsynth" / "test-programs"
)

jax.config.update("jax_num_cpu_devices", FAKE_DEVICES)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
# Where a test does run on an accelerator, the parity bounds still mean float32 products.
jax.config.update("jax_default_matmul_precision", "highest")

# Grain reads absl flags, which nothing has parsed under pytest.
if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


def pytest_configure(config: pytest.Config) -> None:
    # Two test processes may meet at a half-written cache entry: JAX compiles again and warns.
    config.addinivalue_line(
        "filterwarnings",
        "ignore:Error (reading|writing) persistent compilation cache entry:UserWarning",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Heavy tests are slow ones, before `-m` chooses; the longest files begin."""
    weights: Counter[Path] = Counter()
    for item in items:
        if item.get_closest_marker("heavy"):
            item.add_marker(pytest.mark.slow)
        # A slow test takes about as long as ten others, one of several processes as a hundred.
        several, slow = map(item.get_closest_marker, ("multiprocess", "slow"))
        weights[item.path] += 100 if several else 10 if slow else 1
    # A file is one process's: begun last, it would leave the other cores idle.
    items.sort(key=lambda item: -weights[item.path])


def pytest_collection_finish() -> None:
    """Rarer searches for garbage, and none in what is imported: they took a tenth of all time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Shapes are checked but in whole runs, which call the same functions for longer."""
    whole = item.get_closest_marker("slow") and not item.get_closest_marker("heavy")
    shape_checks.update("jaxtyping_disable", bool(whole))


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
    """Forgets compiled programs after a file of tests, where they have become many.

    Each takes several memory maps, of which Linux gives a process 65,530; beyond that it crashes.
    Together with what they were traced from they would take 8 GB of a test process.
    """
    yield
    maps, pages = Path("/proc/self/maps"), Path("/proc/self/statm")
    if not maps.exists():
        return
    used = int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if used > MOST_BYTES or maps.read_text().count("\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def key() -> jax.Array:
    """A typed random key, the same in every test."""
    return jax.random.key(0)


@pytest.fixture
def rngs() -> nnx.Rngs:
    """NNX random streams, the same in every test."""
    return nnx.Rngs(0)


@pytest.fixture
def interruptible():
    """SIGINT as a terminal's programs have it: those of a background job ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def compilation_cache() -> Path:
    """The folder of compiled programs, for tests that start further processes."""
    return CACHE


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    """A pipeline of random weights, its CLIP in `clip/`."""
    from tests.methods.small_base import write_base

    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def deeper_folder(tmp_path_factory) -> Path:
    """`base_folder` with a denoiser of two levels, which has every kind of layer."""
    from tests.methods.small_base import DEEPER, write_base

    return write_base(tmp_path_factory.mktemp("deeper"), DEEPER)


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory) -> Path:
    """An SDXL of random weights."""
    from tests.methods.small_base import write_sdxl

    return write_sdxl(tmp_path_factory.mktemp("sdxl"))
