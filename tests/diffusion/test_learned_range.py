"""Learned variances: the loss against formulas in float64, the sampler against diffusers and the
authors' respaced process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers import DDPMScheduler

from jaxsynth.diffusion.guidance import classifier_free
from jaxsynth.diffusion.learned_range import (
    LearnedRange,
    learned_range_loss,
    make_learned_range,
    split_output,
    variational_bound,
    without_variance,
)
from jaxsynth.diffusion.samplers import initial_noise, make_sampler, sample
from jaxsynth.diffusion.schedules import NoiseSchedule, add_noise

DIT = {
    "_class_name": "DDPMScheduler",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": False,
    "timestep_spacing": "linspace",
    "variance_type": "learned_range",
}


loss_of = jax.jit(learned_range_loss, static_argnames=("vlb_weight", "per_sample"))
bound_of = jax.jit(variational_bound)


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule.from_config(DIT)


def batch(schedule, t, seed=0):
    """x0 partly beyond +-0.999, a prediction that is near the noise, and v a little beyond +-1."""
    rng = np.random.default_rng(seed)
    shape = (len(t), 3, 3, 2)
    x0 = (0.8 * rng.normal(size=shape)).astype(np.float32)
    noise, error = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    v = (0.6 * rng.normal(size=shape)).astype(np.float32)
    output = np.concatenate([noise + 0.3 * error, v], axis=-1)
    t = np.asarray(t, np.int32)
    x_t = np.array(add_noise(schedule, x0, noise, t))  # a copy, which torch may write to
    return output, x0, x_t, noise, t


def reference(output, x0, x_t, noise, t, total=1000):
    """(mse, bound) of each sample in float64, with Bayes' rule and torch's distributions.

    `output` is a torch tensor, so that its gradient can be taken.
    """
    betas = torch.linspace(1e-4, 0.02, total, dtype=torch.float64)
    product = torch.cumprod(1 - betas, 0)
    prediction, v = output.double().chunk(2, -1)
    mse, bounds = [], []

    def posterior(x0, i, t):
        """The normal of x_{t-1}: x_0's forward one times the likelihood of x_t."""
        before, beta = product[t - 1], betas[t]
        precision = 1 / (1 - before) + (1 - beta) / beta
        mean = before.sqrt() * x0 / (1 - before) + (1 - beta).sqrt() * x_t[i].double() / beta
        return mean / precision, 1 / precision

    for i, step in enumerate(t.tolist()):
        mse.append((prediction[i] - noise[i].double()).square().mean())
        a = product[step]
        found = (x_t[i].double() - (1 - a).sqrt() * prediction[i].detach()) / a.sqrt()
        # At the first step the authors take the second's posterior variance for the bound.
        least = posterior(found, i, max(step, 1))[1]
        log_variance = (v[i] + 1) / 2 * betas[step].log() + (1 - v[i]) / 2 * least.log()
        std = (0.5 * log_variance).exp()
        if step > 0:
            mean, variance = posterior(x0[i].double(), i, step)
            truth = torch.distributions.Normal(mean, variance.sqrt())
            guess = torch.distributions.Normal(posterior(found, i, step)[0], std)
            nats = torch.distributions.kl_divergence(truth, guess)
        else:
            # gelu(z) in its tanh form is z times that form of the normal distribution function.
            def below(z):
                return torch.nn.functional.gelu(z, approximate="tanh") / z

            x = x0[i].double()
            upper, lower = below((x - found + 1 / 255) / std), below((x - found - 1 / 255) / std)
            mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
            nats = -mass.clamp(min=1e-12).log()
        bounds.append(nats.mean() / np.log(2))
    return torch.stack(mse), torch.stack(bounds)


STEPS = (0, 1, 2, 40, 500, 999)


def test_loss_is_the_formulas(schedule):
    arrays = batch(schedule, STEPS)
    x0 = arrays[1]
    assert (x0 < -0.999).any() and (x0 > 0.999).any(), "the open bins are not covered"
    tensors = [torch.from_numpy(array) for array in arrays]
    mse, bound = reference(*tensors)
    output, x0, x_t, _, t = arrays
    found = bound_of(schedule, output, x0, x_t, t)
    # The schedule's a_t are float32: of 1 - a_t at t = 0, 2e-4 is rounding.
    np.testing.assert_allclose(found, bound.numpy(), rtol=1e-3)
    loss = loss_of(schedule, *arrays, per_sample=True)
    np.testing.assert_allclose(loss, (mse + bound).numpy(), rtol=1e-3)
    mean = loss_of(schedule, *arrays)
    np.testing.assert_allclose(mean, loss.mean(), rtol=1e-6)


def test_gradients_are_the_formulas(schedule):
    """The bound trains the variance alone, the squared error the mean alone."""
    arrays = batch(schedule, STEPS, seed=1)
    tensors = [torch.from_numpy(array) for array in arrays]
    tensors[0].requires_grad_()
    mse, bound = reference(*tensors)
    (mse + bound).sum().backward()
    found = jax.grad(lambda output: loss_of(schedule, output, *arrays[1:]))(arrays[0])
    expected = tensors[0].grad.numpy() / len(STEPS)
    for half in (slice(None, 2), slice(2, None)):
        scale = np.abs(expected[..., half]).max()
        np.testing.assert_allclose(found[..., half], expected[..., half], atol=1e-3 * scale)
    output, x0, x_t, _, t = arrays
    bound_alone = jax.grad(lambda o: bound_of(schedule, o, x0, x_t, t).sum())(output)
    assert not bound_alone[..., :2].any() and bound_alone[..., 2:].all()


def test_the_bound_is_least_at_the_error_that_is_made(schedule):
    """The best variance is the posterior's plus the square of the mean's error."""
    t = np.array([300])
    output, x0, x_t, noise, _ = batch(schedule, t)
    betas = np.asarray(schedule.betas, np.float64)
    a, before = (float(schedule.alphas_cumprod[i]) for i in (300, 299))
    variance = betas[300] * (1 - before) / (1 - a)
    # An error of the noise moves x_0 by sigma / signal and the mean by the posterior's share.
    share = betas[300] * before**0.5 / (1 - a) * ((1 - a) / a) ** 0.5
    error = (output[..., :2] - noise) * share
    best = np.log(variance + error**2)
    fraction = (best - np.log(variance)) / (np.log(betas[300]) - np.log(variance))

    def bound(v):
        whole = jnp.concatenate([output[..., :2], v], axis=-1)
        return bound_of(schedule, whole, x0, x_t, t).sum()

    at_best = jax.grad(bound)(jnp.asarray(2 * fraction - 1, jnp.float32))
    beside = jax.grad(bound)(jnp.asarray(2 * fraction + 1, jnp.float32))
    assert np.abs(at_best).max() < 1e-2 * np.abs(beside).min()


def test_weight_of_the_bound_follows_the_number_of_steps():
    """lambda = 0.001 of the sum over all steps: at 100 steps a tenth of one step's bound."""
    schedule = NoiseSchedule.from_config({**DIT, "num_train_timesteps": 100})
    arrays = batch(schedule, (3, 70))
    output, x0, x_t, noise, t = arrays
    error = np.square(output[..., :2] - noise).mean((1, 2, 3))
    bound = bound_of(schedule, output, x0, x_t, t)
    loss = loss_of(schedule, *arrays, per_sample=True)
    np.testing.assert_allclose(loss, error + 0.1 * bound, rtol=1e-5)
    off = loss_of(schedule, *arrays, vlb_weight=0.0, per_sample=True)
    np.testing.assert_allclose(off, error, rtol=1e-5)


def test_untrained_outputs_have_finite_losses(schedule):
    """A new network gives zeros; one astray gives anything."""
    for scale in (0.0, 10.0):
        output, *rest = batch(schedule, STEPS)
        grad = jax.value_and_grad(lambda o, rest=rest: loss_of(schedule, o, *rest))
        value, grad = grad(scale * output)
        assert np.isfinite(value) and np.isfinite(grad).all()


def test_low_precision_outputs_give_float32_losses(schedule):
    arrays = batch(schedule, STEPS[2:])
    low = arrays[0].astype(jnp.bfloat16)
    found = loss_of(schedule, low, *arrays[1:], per_sample=True)
    assert found.dtype == jnp.float32
    exact = loss_of(schedule, low.astype(np.float32), *arrays[1:], per_sample=True)
    np.testing.assert_array_equal(found, exact)


def model(x, t):
    """A nonlinear stand-in for a network, near the noise in x, with a variance within bounds."""
    xp = jnp if isinstance(x, jax.Array) else np
    prediction = 0.9 * x + 0.3 * xp.sin(2 * x + t / 90)
    return xp.concatenate([prediction, xp.sin(3 * x - t / 50)], axis=-1)


jit_step = jax.jit(lambda s, output, i, x, noise: s.step((), output, i, x, noise=noise)[0])


@jax.jit
def run(sampler, keys, start):
    return sample(lambda x, t: model(x, t.reshape(-1, 1, 1, 1)), start, sampler, keys=keys)


def channels_first(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x, np.float32), -1, 1)))


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize(
    "change", [{}, {"clip_sample": True, "clip_sample_range": 0.7}, {"steps_offset": 1}]
)
def test_every_step_is_diffusers(spacing, change):
    config = {**DIT, "timestep_spacing": spacing, **change}
    for steps in (4, 30, 250):
        theirs = DDPMScheduler(**{k: v for k, v in config.items() if k != "_class_name"})
        theirs.set_timesteps(steps)
        ours = make_learned_range(NoiseSchedule.from_config(config), steps)
        np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy())
        rng = np.random.default_rng(0)
        x = rng.normal(size=(2, 3, 3, 2)).astype(np.float32)
        for i, t in enumerate(ours.timesteps):
            output = model(x, t).astype(np.float32)
            generators = [torch.Generator().manual_seed(i) for _ in range(2)]
            expected = theirs.step(
                channels_first(output), int(t), channels_first(x), generator=generators[0]
            ).prev_sample
            noise = torch.randn((2, 2, 3, 3), generator=generators[1])
            found = jit_step(ours, output, i, x, np.moveaxis(noise.numpy(), 1, -1))
            expected = np.moveaxis(expected.numpy(), 1, -1)
            scale = np.abs(expected).max()
            np.testing.assert_allclose(found, expected, atol=1e-4 * scale, err_msg=f"{steps}, {t}")
            x = expected


@pytest.mark.parametrize("steps", [10, 250])
def test_a_whole_run_is_the_authors_respaced_process(schedule, steps, key):
    """Their process: evenly spread timesteps, betas of the shortened chain, in float64."""
    kept, position = [], 0.0
    for _ in range(steps):
        kept.append(round(position))
        position += 999 / (steps - 1)
    product = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[kept]
    before = np.append(1.0, product[:-1])
    betas = 1 - product / before
    keys = jax.random.split(key, 2)
    ours = make_learned_range(schedule, steps)
    np.testing.assert_array_equal(ours.timesteps, kept[::-1])
    start = initial_noise(keys, (3, 3, 2), ours)
    found = run(ours, keys, start)
    draw = jax.jit(
        jax.vmap(lambda k, n: jax.random.normal(jax.random.fold_in(k, n), (3, 3, 2)), (0, None))
    )
    x = np.asarray(start, np.float64)
    for number, index in enumerate(reversed(range(steps))):
        prediction, v = np.split(model(x, kept[index]), 2, axis=-1)
        a, b, beta = product[index], before[index], betas[index]
        x0 = (x - np.sqrt(1 - a) * prediction) / np.sqrt(a)
        mean = (beta * np.sqrt(b) * x0 + (1 - b) * np.sqrt(1 - beta) * x) / (1 - a)
        if index > 0:
            least = beta * (1 - b) / (1 - a)
            variance = beta ** ((v + 1) / 2) * least ** ((1 - v) / 2)
            mean = mean + np.sqrt(variance) * np.asarray(draw(keys, number + 1))
        x = mean
    np.testing.assert_allclose(found, x, atol=3e-3 * np.abs(x).max())


def test_an_image_depends_on_its_key_alone(schedule, key):
    sampler = make_learned_range(schedule, 8)
    keys = jax.random.split(key, 4)

    order = np.array([2, 0, 3, 1])
    starts = initial_noise(keys, (3, 3, 2), sampler)
    whole, turned = run(sampler, keys, starts), run(sampler, keys[order], starts[order])
    np.testing.assert_allclose(whole[order], turned, atol=1e-5)
    assert np.abs(whole[0] - whole[1]).max() > 0.1
    # The same start with other keys: the steps draw too.
    assert np.abs(run(sampler, keys[order], starts) - whole).max() > 0.1


def test_other_samplers_take_the_prediction(schedule, key):
    ddim = make_sampler("ddim", schedule, 5)
    start = jax.random.normal(key, (2, 3, 3, 2))

    def denoise(x, t):
        return model(x, t.reshape(-1, 1, 1, 1))

    found = jax.jit(lambda x: sample(without_variance(denoise), x, ddim))(start)
    expected = jax.jit(lambda x: sample(lambda x, t: denoise(x, t)[..., :2], x, ddim))(start)
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match=r"\(2, 3, 3, 4\) for x .* expected \(2, 3, 3, 2\)"):
        sample(denoise, start, ddim)
    learned = make_learned_range(schedule, 5)
    with pytest.raises(ValueError, match=r"\(2, 3, 3, 2\) for x .* expected \(2, 3, 3, 4\)"):
        sample(without_variance(denoise), start, learned, keys=jax.random.split(key, 2))


def test_guidance_leaves_the_variance_to_the_condition(schedule, key):
    """As the authors' sampler guides: the first channels of the noise, and nothing else."""
    x, t = jax.random.normal(key, (2, 3, 3, 4)), jnp.array([5, 600])

    def denoise(x, t, label):
        return model(x, t.reshape(-1, 1, 1, 1)) * label.reshape(-1, 1, 1, 1)

    cond, uncond = jnp.array([1.0, 2.0]), jnp.array([0.5])
    found = jax.jit(classifier_free(denoise, 4.0, cond, uncond, channels=3))(x, t)
    with_label, without = (jax.jit(denoise)(x, t, label) for label in (cond, uncond.repeat(2)))
    guided = without + 4.0 * (with_label - without)
    np.testing.assert_allclose(found[..., :3], guided[..., :3], atol=1e-5)
    np.testing.assert_allclose(found[..., 3:], with_label[..., 3:], atol=1e-6)
    keys = jax.random.split(key, 2)
    sampler = make_learned_range(schedule, 4)
    guide = classifier_free(denoise, 4.0, cond, uncond, channels=3)
    out = jax.jit(lambda x: sample(guide, x, sampler, keys=keys))(x)
    assert out.shape == (2, 3, 3, 4) and np.isfinite(out).all()


def test_a_wild_variance_leaves_the_last_step_alone(schedule):
    """It adds no noise, so nothing of v may show there, not even an overflow."""
    sampler = make_learned_range(schedule, 4)
    x = jnp.ones((1, 2, 2, 1))
    results = [
        sampler.step((), jnp.concatenate([x, v * x], axis=-1), 3, x, noise=x)[0] for v in (0.0, 1e4)
    ]
    np.testing.assert_array_equal(*results)
    assert np.isfinite(results[0]).all()


def test_other_predictions_and_what_is_refused(schedule, key):
    for prediction in ("v_prediction", "sample"):
        other = NoiseSchedule.from_config({**DIT, "prediction_type": prediction})
        _, x0, x_t, noise, t = batch(other, (1, 500))
        signal = np.sqrt(np.asarray(other.alphas_cumprod)[t]).reshape(-1, 1, 1, 1)
        sigma = np.sqrt(1 - signal**2)
        exact = x0 if prediction == "sample" else signal * noise - sigma * x0
        # An exact prediction at v = -1 is the posterior itself.
        perfect = np.concatenate([exact, -np.ones_like(x0)], axis=-1)
        bound = bound_of(other, perfect, x0, x_t, t)
        np.testing.assert_allclose(bound, 0, atol=1e-4)
    sampler = make_learned_range(schedule, 4)
    x = jnp.ones((1, 2, 2, 1))
    with pytest.raises(ValueError, match="even number of channels"):
        split_output(jnp.ones((1, 2, 2, 3)))
    with pytest.raises(ValueError, match="needs `noise`"):
        sampler.step((), jnp.ones((1, 2, 2, 2)), 0, x)
    with pytest.raises(ValueError, match=r"x0 \(1, 2, 2, 1\) and x_t \(1, 2, 2, 2\) do not"):
        ones = jnp.ones((1, 2, 2, 2))
        variational_bound(schedule, ones, x, ones, jnp.array([1]))
    with pytest.raises(ValueError, match="num_inference_steps: expected 1 to 1000"):
        make_learned_range(schedule, 1001)
    with pytest.raises(ValueError, match="spacing: expected leading, linspace or trailing"):
        make_learned_range(schedule, 10, spacing="even")
    trailing = make_learned_range(schedule, 10, spacing="trailing")
    assert trailing.timesteps[0] == 999 and isinstance(trailing, LearnedRange)
    with pytest.raises(ValueError, match="expected 2 keys, one per image"):
        sample(lambda x, t: x, jnp.ones((2, 2, 2, 1)), sampler)
