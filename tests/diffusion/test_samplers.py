"""Every sampler against the diffusers scheduler of its name, after every single step."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)

from jaxsynth.diffusion.samplers import initial_noise, make_sampler, sample
from jaxsynth.diffusion.schedules import NoiseSchedule

# diffusers hands torch tensors to np.array, whose __array__ predates NumPy 2's `copy`.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STEPS = (4, 10, 50)
SPACINGS = ("leading", "linspace", "trailing")
# Two float32 computations over 50 nonlinear steps; most cases stay below 1e-5.
TOLERANCE = 2e-5


def model(x, t):
    """A nonlinear stand-in for a network, depending on x and t, in numpy.

    Close to x, as the noise in x_t is: a model far from it makes x grow and trajectories chaotic,
    and then the comparison measures the model and not the sampler.
    """
    x, t = np.asarray(x, np.float64), float(t)
    return (0.9 * x + 0.3 * np.sin(2 * x + t / 90)).astype(np.float32)


def jax_model(x, t):
    t = t.reshape(-1, 1, 1, 1) if jnp.ndim(t) else t
    return 0.9 * x + 0.3 * jnp.sin(2 * x + t / 90)


jit_step = jax.jit(lambda s, carry, output, i, x, noise: s.step(carry, output, i, x, noise=noise))


def built(cls, steps, *, eta=0.0, **config):
    theirs = cls(**{**SD, **config})
    schedule = NoiseSchedule.from_config(dict(theirs.config, _class_name=cls.__name__))
    theirs.set_timesteps(steps)
    ours = make_sampler(cls.__name__, schedule, steps, eta=eta)
    return theirs, ours


def assert_same_steps(theirs, ours, *, eta=0.0, exact=True, tolerance=TOLERANCE):
    timesteps = theirs.timesteps.numpy()
    if exact:
        np.testing.assert_array_equal(ours.timesteps, timesteps)
    else:
        np.testing.assert_allclose(ours.timesteps, timesteps, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(ours.init_noise_sigma, float(theirs.init_noise_sigma), rtol=1e-6)
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(0)  # it would look an index up, and duplicates confuse it
    rng = np.random.default_rng(0)
    start = rng.standard_normal((2, 3, 3, 2)).astype(np.float32) * float(ours.init_noise_sigma)
    a, b = torch.tensor(start), jnp.asarray(start)
    carry = ours.init(b)
    for i, t in enumerate(theirs.timesteps):
        scaled = theirs.scale_model_input(a, t).numpy()
        output = torch.tensor(model(scaled, timesteps[i]))
        noise = rng.standard_normal(start.shape).astype(np.float32)
        extra = {"eta": eta, "variance_noise": torch.tensor(noise)} if eta else {}
        ours_output = model(ours.scale_model_input(b, i), timesteps[i])
        a = theirs.step(output, t, a, **extra).prev_sample
        b, carry = jit_step(ours, carry, ours_output, i, b, noise)
        error = np.abs(a.numpy() - np.asarray(b)).max() / np.abs(a.numpy()).max()
        assert error < tolerance, f"step {i} of {len(timesteps)} (t={t}): relative error {error}"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim(spacing, prediction):
    for steps, (clip, one) in itertools.product(STEPS, [(False, False), (True, True)]):
        config = {
            "clip_sample": clip,
            "clip_sample_range": 0.8,
            "set_alpha_to_one": one,
            "timestep_spacing": spacing,
            "prediction_type": prediction,
            "steps_offset": 1 if spacing == "leading" else 0,
        }
        assert_same_steps(*built(DDIMScheduler, steps, **config))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_noise(eta, prediction):
    for steps in STEPS:
        config = {"clip_sample": False, "prediction_type": prediction}
        assert_same_steps(*built(DDIMScheduler, steps, eta=eta, **config), eta=eta)


def test_ddim_from_zero_terminal_snr():
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    pair = built(DDIMScheduler, 10, prediction_type="v_prediction", **config)
    assert_same_steps(*pair, tolerance=1e-4)  # torch's square root makes another table
    with pytest.raises(ValueError, match="zero terminal SNR"):
        built(DDIMScheduler, 10, prediction_type="epsilon", **config)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_pndm(spacing, prediction):
    for steps, one in itertools.product((1, 2, 3, *STEPS), (False, True)):
        config = {
            "skip_prk_steps": True,
            "set_alpha_to_one": one,
            "timestep_spacing": spacing,
            "prediction_type": prediction,
            "steps_offset": 1 if spacing == "leading" else 0,
        }
        theirs, ours = built(PNDMScheduler, steps, **config)
        assert len(ours.timesteps) == (steps + 1 if steps > 1 else 1)
        assert_same_steps(theirs, ours)


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_dpm_solver(spacing, prediction, karras):
    # Karras sigmas end on sigma_min: a last step of length 0, where diffusers' heun divides 0 by 0.
    solver = "midpoint" if karras else "heun"
    variants = [
        {"final_sigmas_type": "zero"},
        {"final_sigmas_type": "zero", "solver_type": "heun"},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False, "solver_type": solver},
        {"final_sigmas_type": "sigma_min", "euler_at_final": True},
        {"solver_order": 1},
    ]
    for steps, variant in itertools.product(STEPS, variants):
        config = {
            "timestep_spacing": spacing,
            "prediction_type": prediction,
            "use_karras_sigmas": karras,
            **variant,
        }
        assert_same_steps(*built(DPMSolverMultistepScheduler, steps, **config))


def test_dpm_solver_last_step_of_length_zero_stays_put():
    config = {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "solver_type": "heun"}
    _, ours = built(DPMSolverMultistepScheduler, 6, **config, lower_order_final=False)
    x, carry = jnp.full((1, 2), 0.5), jnp.full((1, 2), 9.0)
    np.testing.assert_array_equal(ours.step(carry, x * 3, 5, x)[0], x)


def test_dpm_solver_karras_truncates_for_the_cosine_schedule():
    config = {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True}
    # Sigmas start at 2e4 here, which costs float32 digits.
    assert_same_steps(*built(DPMSolverMultistepScheduler, 10, **config), tolerance=1e-4)


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_euler(spacing, prediction, karras):
    for steps, final in itertools.product(STEPS, ("zero", "sigma_min")):
        config = {
            "timestep_spacing": spacing,
            "prediction_type": prediction,
            "use_karras_sigmas": karras,
            "final_sigmas_type": final,
            "steps_offset": 1 if spacing == "leading" else 0,
        }
        # Karras timesteps are fractional and come out of a logarithm, which torch rounds its way.
        assert_same_steps(*built(EulerDiscreteScheduler, steps, **config), exact=not karras)


@pytest.mark.parametrize("cls", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_sigma_samplers_from_zero_terminal_snr(cls):
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pair = built(cls, 10, prediction_type="v_prediction", **config)
    assert_same_steps(*pair, tolerance=1e-4)


SAMPLERS = {
    "ddim": {"clip_sample": False},
    "pndm": {"skip_prk_steps": True},
    "dpmsolver++": {},
    "euler": {},
}


def sampler_named(name, steps=6, eta=0.0):
    return make_sampler(name, NoiseSchedule.from_config({**SD, **SAMPLERS[name]}), steps, eta=eta)


@pytest.mark.parametrize("name", SAMPLERS)
def test_scan_equals_the_loop(name, key):
    sampler = sampler_named(name)
    x = initial_noise(jax.random.split(key, 3), (4, 4, 2), sampler)
    scanned = jax.jit(lambda x: sample(jax_model, x, sampler))(x)
    carry, y = sampler.init(x), x
    for i, t in enumerate(sampler.timesteps):
        y, carry = sampler.step(carry, jax_model(sampler.scale_model_input(y, i), t), i, y)
    np.testing.assert_allclose(scanned, y, atol=1e-5)


@pytest.mark.parametrize(("name", "eta"), [*((n, 0.0) for n in SAMPLERS), ("ddim", 1.0)])
def test_an_image_does_not_depend_on_its_batch(name, eta, key):
    sampler = sampler_named(name, eta=eta)
    keys = jax.random.split(key, 6)

    @jax.jit
    def generate(keys):
        return sample(jax_model, initial_noise(keys, (4, 4, 2), sampler), sampler, keys=keys)

    together = generate(keys)
    apart = jnp.concatenate([generate(keys[:3]), generate(keys[3:])])
    np.testing.assert_allclose(together, apart, rtol=1e-6, atol=1e-6)
    reordered = generate(keys[::-1])[::-1]
    np.testing.assert_allclose(together, reordered, rtol=1e-6, atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_eta_noise_differs_between_steps_and_from_the_start(key):
    sampler = sampler_named("ddim", steps=3, eta=1.0)
    keys = jax.random.split(key, 2)
    x = initial_noise(keys, (8, 8, 1), sampler)
    quiet = sample(lambda x, t: x * 0, x, sampler_named("ddim", steps=3))
    noisy = sample(lambda x, t: x * 0, x, sampler, keys=keys)
    added = np.asarray(noisy - quiet).ravel()
    assert np.abs(np.corrcoef(added, np.asarray(x).ravel())[0, 1]) < 0.3
    with pytest.raises(ValueError, match="2 keys"):
        sample(jax_model, x, sampler)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtype_is_stable(name, dtype, key):
    sampler = sampler_named(name)
    seen = []

    def denoise(x, t):
        seen.append((x.dtype, t.shape, t.dtype))
        return jax_model(x, t).astype(dtype)

    x = initial_noise(jax.random.split(key, 2), (4, 4, 2), sampler, dtype)
    result = sample(denoise, x, sampler)
    assert result.dtype == dtype
    time = jnp.float32 if name == "euler" else jnp.int32
    assert set(seen) == {(jnp.dtype(dtype), (2,), jnp.dtype(time))}
    full = sample(jax_model, x.astype(jnp.float32), sampler)
    np.testing.assert_allclose(result.astype(jnp.float32), full, atol=0.15)


def test_sampler_is_a_jit_argument(key):
    x = initial_noise(jax.random.split(key, 2), (2, 2, 1), sampler_named("pndm"))
    run = jax.jit(lambda s, x: sample(jax_model, x, s))
    for spacing in ("leading", "linspace"):
        schedule = NoiseSchedule.from_config({**SAMPLERS["pndm"], "timestep_spacing": spacing})
        sampler = make_sampler("pndm", schedule, 6)
        np.testing.assert_allclose(run(sampler, x), sample(jax_model, x, sampler), atol=1e-5)


def test_samplers_recover_x0_from_a_perfect_model(key):
    """With a model that knows x_0 every method must end on it."""
    x0 = jax.random.normal(key, (2, 4, 4, 1))
    for name, options in SAMPLERS.items():
        prediction = {"prediction_type": "epsilon" if name == "pndm" else "sample"}
        config = {**SD, **options, **prediction, "set_alpha_to_one": True}
        schedule = NoiseSchedule.from_config(config)
        sampler = make_sampler(name, schedule, 8)
        a = jnp.asarray(schedule.alphas_cumprod)

        def denoise(x, t, a=a, name=name):
            if name != "pndm":
                return x0
            signal = jnp.sqrt(a[t]).reshape(-1, 1, 1, 1)
            return (x - signal * x0) / jnp.sqrt(1 - signal**2)

        x = initial_noise(jax.random.split(key, 2), (4, 4, 1), sampler)
        # PLMS extrapolates epsilon, so its end is near x_0 and not on it.
        tolerance = 0.05 if name == "pndm" else 1e-5
        np.testing.assert_allclose(sample(denoise, x, sampler), x0, atol=tolerance)


def test_trailing_spacing_has_as_many_steps_as_asked():
    config = {**SD, "clip_sample": False, "timestep_spacing": "trailing"}
    schedule = NoiseSchedule.from_config(config)
    timesteps = make_sampler("ddim", schedule, 61).timesteps
    assert len(timesteps) == 61 and timesteps.min() >= 0
    theirs = DDIMScheduler(**config)
    theirs.set_timesteps(61)  # has a 62nd timestep, -1
    np.testing.assert_array_equal(timesteps, theirs.timesteps.numpy()[:61])


@pytest.mark.parametrize(
    ("name", "config", "named"),
    [
        ("pndm", {}, "skip_prk_steps"),
        ("pndm", {"skip_prk_steps": True, "prediction_type": "sample"}, "prediction_type"),
        ("pndm", {"skip_prk_steps": True, "clip_sample": True}, "clip_sample"),
        ("pndm", {"skip_prk_steps": True, "rescale_betas_zero_snr": True}, "rescale_betas"),
        ("ddim", {"thresholding": True}, "thresholding"),
        ("ddim", {"use_karras_sigmas": True}, "use_karras_sigmas"),
        ("dpmsolver++", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type"),
        ("dpmsolver++", {"solver_order": 3}, "solver_order"),
        ("dpmsolver++", {"solver_type": "bh2"}, "solver_type"),
        ("dpmsolver++", {"use_lu_lambdas": True}, "use_lu_lambdas"),
        ("dpmsolver++", {"lambda_min_clipped": -5.1}, "lambda_min_clipped"),
        ("euler", {"interpolation_type": "log_linear"}, "interpolation_type"),
        ("euler", {"timestep_type": "continuous"}, "timestep_type"),
        ("euler", {"sigma_max": 3.0}, "sigma_max"),
        ("euler", {"use_beta_sigmas": True}, "use_beta_sigmas"),
        ("unipc", {}, "no sampler 'unipc'"),
        ("euler_ancestral", {"prediction_type": "sample"}, "prediction_type"),
        ("ddpm", {"variance_type": "fixed_large_log"}, "variance_type.*fixed_large_log"),
        ("ddpm", {"variance_type": "learned"}, "variance_type.*learned"),
        ("ddpm", {"thresholding": True}, "thresholding"),
        ("lcm", {"original_inference_steps": 8}, "num_inference_steps.*original_inference_steps"),
        ("ddim", {"timestep_spacing": "middle"}, "timestep_spacing.*middle"),
        ("euler", {"final_sigmas_type": "one"}, "final_sigmas_type"),
        ("ddim", {"betas_end": 0.1}, "'betas_end'.*unknown"),
        ("pndm", {"skip_prk_steps": "yes"}, "skip_prk_steps.*expected a bool"),
    ],
)
def test_an_option_that_is_not_implemented_is_named(name, config, named):
    schedule = NoiseSchedule.from_config({**SD, **config})
    with pytest.raises(ValueError, match=named):
        make_sampler(name, schedule, 10)


def compare_with_the_same_noise(monkeypatch, cls, steps, **config):
    """Every step against diffusers', which is given the noise that ours is given."""
    theirs, ours = built(cls, steps, **config)
    drawn = np.random.default_rng(1)
    shape = (2, 3, 3, 2)
    noises = [drawn.standard_normal(shape).astype(np.float32) for _ in range(steps)]
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy())
    np.testing.assert_allclose(ours.init_noise_sigma, float(theirs.init_noise_sigma), rtol=1e-6)
    start = drawn.standard_normal(shape).astype(np.float32) * float(ours.init_noise_sigma)
    a, b, carry = torch.tensor(start), jnp.asarray(start), ()
    for i, t in enumerate(theirs.timesteps):
        monkeypatch.setattr(
            f"{cls.__module__}.randn_tensor", lambda *_, i=i, **__: torch.tensor(noises[i])
        )
        output = torch.tensor(model(theirs.scale_model_input(a, t).numpy(), float(t)))
        ours_output = model(ours.scale_model_input(b, i), float(t))
        a = theirs.step(output, t, a).prev_sample
        b, carry = jit_step(ours, carry, ours_output, i, b, noises[i])
        error = np.abs(a.numpy() - np.asarray(b)).max() / np.abs(a.numpy()).max()
        assert error < TOLERANCE, f"step {i} (t={t}): relative error {error}"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_euler_ancestral(monkeypatch, spacing, prediction):
    for steps in STEPS:
        config = {"timestep_spacing": spacing, "prediction_type": prediction}
        compare_with_the_same_noise(monkeypatch, EulerAncestralDiscreteScheduler, steps, **config)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_ddpm(monkeypatch, variance, prediction):
    for steps, spacing, clip in zip(STEPS, SPACINGS, (True, False, True), strict=True):
        config = {
            "timestep_spacing": spacing,
            "prediction_type": prediction,
            "variance_type": variance,
            "clip_sample": clip,
            "steps_offset": int(spacing == "leading"),
        }
        compare_with_the_same_noise(monkeypatch, DDPMScheduler, steps, **config)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_lcm(monkeypatch, prediction):
    for steps, distilled, clip in ((1, 50, False), (4, 50, True), (7, 30, False), (50, 50, False)):
        config = {
            "prediction_type": prediction,
            "original_inference_steps": distilled,
            "clip_sample": clip,
        }
        compare_with_the_same_noise(monkeypatch, LCMScheduler, steps, **config)


def test_a_sampler_that_is_asked_for_replaces_the_one_of_the_config():
    """What only the config's own class can do is dropped, what is the schedule's is kept."""
    config = {
        **SD,
        "_class_name": "UniPCMultistepScheduler",
        "prediction_type": "v_prediction",
        "solver_type": "bh2",
        "use_karras_sigmas": True,
        "timestep_spacing": "trailing",
        "disable_corrector": [0, 1],
    }
    schedule = NoiseSchedule.from_config(config)
    plain = NoiseSchedule.from_config({**SD, "prediction_type": "v_prediction"})
    np.testing.assert_array_equal(schedule.alphas_cumprod, plain.alphas_cumprod)
    assert schedule.prediction_type == "v_prediction" and isinstance(hash(schedule.stated), int)
    for name in ("ddim", "dpmsolver++", "euler", "euler_ancestral", "ddpm", "lcm"):
        make_sampler(name, schedule, 10)
    assert make_sampler("ddim", schedule, 10).timesteps[0] == 999  # trailing, as stated
    with pytest.raises(ValueError, match="no sampler 'UniPCMultistepScheduler'"):
        make_sampler(config, schedule, 10)
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        make_sampler(
            "pndm", NoiseSchedule.from_config({**config, "rescale_betas_zero_snr": True}), 9
        )


def test_bad_arguments_are_named():
    schedule = NoiseSchedule.from_config({**SD, "clip_sample": False, "skip_prk_steps": True})
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="num_inference_steps"):
            make_sampler("ddim", schedule, steps)
    with pytest.raises(ValueError, match="eta"):
        make_sampler("pndm", schedule, 10, eta=0.5)
    with pytest.raises(ValueError, match="eta"):
        make_sampler("ddim", schedule, 10, eta=2.0)
    with pytest.raises(ValueError, match="steps_offset"):
        make_sampler("ddim", NoiseSchedule.from_config({"steps_offset": 1}), 1000)
    with pytest.raises(ValueError, match="visit a timestep twice"):
        make_sampler("dpmsolver++", schedule, 1000)
    with pytest.raises(ValueError, match="another noise schedule"):
        make_sampler({"_class_name": "DDIMScheduler"}, schedule, 10)
    sampler = make_sampler({**SD, "_class_name": "DDIMScheduler"}, schedule, 10)
    assert sampler.clip == 1.0  # the dict's own options hold, and DDIM's default is to clip
