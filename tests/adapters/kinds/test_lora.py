"""LoRA against peft: forward, gradients and merged weights; initialisation, dropout, dtypes."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds.lora import LoRAConfig, add_lora
from tests.adapters.nets import CONFIG, TARGETS, Net, TorchNet, randomised
from tests.models.torch_parity import copy_weights, nchw, randomise


@pytest.fixture
def images():
    return jax.random.normal(jax.random.key(1), (4, 8, 8, 3))


def pair(config: LoRAConfig):
    """The same adapted network in NNX and in peft, every tensor random."""
    plain = randomise(TorchNet())
    model = Net(rngs=nnx.Rngs(0))
    copy_weights(plain, model)
    adapted = add_lora(model, config, rngs=nnx.Rngs(0))
    adapted = inject.load_state(adapted, randomised(inject.extract(adapted), 2))
    wrapped = peft.LoraModel(
        plain,
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            target_modules=list(config.targets),
            use_rslora=config.use_rslora,
            rank_pattern=dict(config.rank_pattern),
            alpha_pattern=dict(config.alpha_pattern),
        ),
        "default",
    )
    with torch.no_grad():
        for name, value in inject.extract(adapted).arrays.items():
            parameter(wrapped, name).copy_(torch.from_numpy(np.array(to_torch(value))))
    return adapted, wrapped.eval()


def parameter(wrapped, name):
    path, _, factor = name.rpartition(".")
    return wrapped.model.get_submodule(f"{path}.{factor}.default").weight


def to_torch(value):
    return value.T if value.ndim == 2 else jnp.transpose(value, (3, 2, 0, 1))


@pytest.mark.heavy
@pytest.mark.parametrize("use_rslora", [False, True])
def test_forward_gradient_and_merged_weights_equal_peft(images, use_rslora):
    adapted, wrapped = pair(replace(CONFIG, use_rslora=use_rslora))
    expected = wrapped.model(nchw(images))
    bound = 1e-5 * float(expected.detach().abs().max())
    np.testing.assert_allclose(adapted(images), expected.detach().numpy(), atol=bound)

    weights = jax.random.normal(jax.random.key(9), expected.shape)
    (expected * torch.from_numpy(np.array(weights))).sum().backward()
    graphdef, trainable, frozen = nnx.split(adapted, inject.Trainable, ...)
    grads = jax.grad(lambda t: (nnx.merge(graphdef, t, frozen)(images) * weights).sum())(trainable)
    for name, found in inject.extract(nnx.merge(graphdef, grads, frozen)).arrays.items():
        torch_grad = parameter(wrapped, name).grad.numpy()
        bound = 1e-5 * np.abs(torch_grad).max()
        np.testing.assert_allclose(to_torch(found), torch_grad, atol=bound, err_msg=name)

    merged, torch_merged = inject.merge(adapted), wrapped.merge_and_unload()
    for name in TARGETS:
        found = inject.layers(merged)[name].kernel[...]
        wanted = torch_merged.get_submodule(name).weight.detach()
        np.testing.assert_allclose(to_torch(found), wanted, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": (3, 3), "padding": ((1, 1), (1, 1))},
        {"kernel_size": (3, 3), "padding": ((0, 1), (0, 1)), "strides": 2},
        {"kernel_size": (5, 3), "padding": "SAME", "strides": (2, 1)},
        {"kernel_size": (3, 3), "padding": "VALID", "kernel_dilation": 2},
        {"kernel_size": (3, 3), "padding": 2, "kernel_dilation": (1, 2)},
        {"kernel_size": (1, 1), "padding": 0, "strides": 2},
        {"kernel_size": (1, 1), "padding": 1},
        {"kernel_size": (3,), "padding": "SAME", "strides": 2},
        {"kernel_size": (3, 1, 2), "padding": 1, "strides": (1, 2, 1)},
    ],
    ids=str,
)
def test_convolutions_equal_their_merged_kernel(options):
    model = nnx.Sequential(nnx.Conv(4, 6, rngs=nnx.Rngs(0), **options))
    adapted = add_lora(model, LoRAConfig(rank=2, alpha=3, targets=("layers.0",)), rngs=nnx.Rngs(0))
    adapted = inject.load_state(adapted, randomised(inject.extract(adapted), 2))
    sizes = (9, 8, 5)[: len(options["kernel_size"])]
    images = jax.random.normal(jax.random.key(0), (2, *sizes, 4))
    np.testing.assert_allclose(adapted(images), inject.merge(adapted)(images), atol=1e-5)
    np.testing.assert_allclose(adapted(images[0]), adapted(images)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": (3,) * 4}, r"spatial axes one of \(1, 2, 3\), found 4"),
        ({"kernel_size": (3, 3), "feature_group_count": 2}, "feature_group_count 1, found 2"),
        ({"kernel_size": (3, 3), "padding": "CIRCULAR"}, "padding 'CIRCULAR'"),
    ],
)
def test_convolutions_that_lora_does_not_follow(options, message):
    model = nnx.Sequential(nnx.Conv(4, 6, rngs=nnx.Rngs(0), **options))
    with pytest.raises(ValueError, match=rf"layers.0: .*{message}"):
        add_lora(model, LoRAConfig(targets=("layers.0",)), rngs=nnx.Rngs(0))


def test_mapped_kernels_make_no_grouped_convolution(images):
    adapted = add_lora(Net(rngs=nnx.Rngs(0)), CONFIG, rngs=nnx.Rngs(0))
    graphdef, trainable, frozen = nnx.split(adapted, inject.Trainable, ...)

    def loss(trainable, images):
        return (nnx.merge(graphdef, trainable, frozen)(images) ** 2).sum()

    mapped = jax.vmap(jax.grad(loss), in_axes=(0, None))
    program = str(jax.make_jaxpr(mapped)(inject.stack([trainable] * 2), images))
    assert "dot_general" in program
    assert "feature_group_count=2" not in program
    assert "batch_group_count=2" not in program


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_initial_factors(init, images):
    model = Net(rngs=nnx.Rngs(0))
    config = LoRAConfig(rank=64, targets=TARGETS, init=init)
    adapted = add_lora(model, config, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(adapted(images), model(images))
    for layer, fan_in in ((adapted.down, 27), (adapted.blocks[0], 8)):
        factor = np.asarray(layer.lora_A[...])
        if init == "gaussian":
            assert factor.std() == pytest.approx(1 / 64, rel=0.1)
        else:
            bound = 1 / math.sqrt(fan_in)
            assert 0.97 * bound < np.abs(factor).max() <= bound
            assert factor.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert not np.any(layer.lora_B[...])


def test_compute_follows_the_base_and_factors_stay_float32(images):
    adapted = add_lora(Net(dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), CONFIG, rngs=nnx.Rngs(0))
    adapted = inject.load_state(adapted, randomised(inject.extract(adapted), 2))
    out = adapted(images)
    assert out.dtype == jnp.bfloat16
    assert inject.with_scale(adapted, jnp.float32(0.5))(images).dtype == jnp.bfloat16
    dtypes = {value.dtype for value in inject.extract(adapted).arrays.values()}
    assert dtypes == {jnp.dtype("float32")}
    single = add_lora(Net(rngs=nnx.Rngs(0)), CONFIG, rngs=nnx.Rngs(0))
    single = inject.load_state(single, inject.extract(adapted))
    expected = single(images)
    assert np.abs(out - expected).max() < 0.03 * np.abs(expected).max()


def test_dropout(images):
    config = replace(CONFIG, dropout=0.5)
    adapted = add_lora(Net(rngs=nnx.Rngs(0)), config, rngs=nnx.Rngs(0))
    adapted = inject.load_state(adapted, randomised(inject.extract(adapted), 2))
    plain = inject.load_state(
        add_lora(Net(rngs=nnx.Rngs(0)), CONFIG, rngs=nnx.Rngs(0)), inject.extract(adapted)
    )
    np.testing.assert_array_equal(adapted(images), plain(images))

    graphdef, state = nnx.split(adapted)

    @jax.jit
    def forward(state, key):
        model = inject.seed_dropout(nnx.merge(graphdef, state), key)
        return model(images), model.blocks[0].drop(jnp.ones((400, 8))), model.blocks[1].dropout_key

    keys = jax.random.split(jax.random.key(0), 3)
    first, mask, other_key = forward(state, keys[0])
    np.testing.assert_array_equal(forward(state, keys[0])[0], first)
    assert np.abs(forward(state, keys[1])[0] - first).max() > 1e-2
    assert set(np.unique(mask)) == {0.0, 2.0}
    assert mask.mean() == pytest.approx(1, abs=0.05)
    own_key = inject.seed_dropout(adapted, keys[0]).blocks[0].dropout_key
    assert jax.random.key_data(own_key).tolist() != jax.random.key_data(other_key).tolist()

    together = jax.vmap(forward, in_axes=(None, 0))(state, keys)[0]
    np.testing.assert_allclose(together[2], forward(state, keys[2])[0], atol=1e-5)
    # The input model is as deterministic as before.
    np.testing.assert_array_equal(adapted(images), plain(images))


def test_layers_stacked_for_scan():
    build = nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs))
    model = nnx.Sequential(build(nnx.Rngs(0).split(3)))
    adapted = add_lora(model, LoRAConfig(rank=2, alpha=3, targets=("layers.0",)), rngs=nnx.Rngs(0))
    adapted = inject.load_state(adapted, randomised(inject.extract(adapted), 2))

    def run(stacked):
        graphdef, state = nnx.split(stacked)

        def body(x, s):
            return (jnp.tanh(nnx.merge(graphdef, s)(x)), None)

        return jax.lax.scan(body, jnp.ones((2, 4)), state)[0]

    merged = inject.merge(adapted).layers[0]
    assert merged.kernel.get_value().shape == (3, 4, 4)
    np.testing.assert_allclose(run(adapted.layers[0]), run(merged), atol=1e-5)


def test_config():
    config = LoRAConfig(
        rank=8, alpha=4, rank_pattern={r"attn1\.to_q": 2}, alpha_pattern={"to_q": 6}
    )
    assert config.scaling_at("mid.attn1.to_q") == 3
    assert config.scaling_at("mid.attn2.to_q") == 6 / 8
    assert config.scaling_at("mid.attn2.xto_q") == 0.5
    assert LoRAConfig(rank=8).scaling_at("x") == 1
    assert LoRAConfig(rank=16, alpha=8, use_rslora=True).scaling_at("x") == 2
    assert hash(config) == hash(replace(config))
    for field, value in (
        ("rank", 0),
        ("dropout", 1.0),
        ("init", "svd"),
        ("rank_pattern", {"to_q": 0}),
    ):
        with pytest.raises(ValueError, match=r"LoRAConfig.*(rank|dropout|init|to_q)"):
            LoRAConfig(**{field: value})
