"""New rows of a text encoder's table: trainable beside a base that stays, and a longer table."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxsynth.adapters.inject import Trainable, merge
from jaxsynth.adapters.surgery.token_rows import add_rows, new_rows, with_rows
from jaxsynth.models.clip import CLIPTextConfig, CLIPTextModel
from tests.methods.small_base import TEXT, random_network

IDS = np.array([[558, 3, 7, 559, 559]])
NEW = np.array([[558, 3, 561, 560, 559]])


@pytest.fixture(scope="module")
def encoder():
    return random_network(CLIPTextModel, CLIPTextConfig.from_dict(TEXT), 0)


def test_rows_are_added_to_a_table_that_stays(encoder):
    added = add_rows(encoder, 2, start=7)
    states = encoder(IDS).last_hidden_state
    np.testing.assert_array_equal(added(IDS).last_hidden_state, states)
    # Both start as the word 7.
    same = encoder(np.where(NEW > 559, 7, NEW)).last_hidden_state
    np.testing.assert_array_equal(added(NEW).last_hidden_state, same)
    _, learns, rest = nnx.split(added, Trainable, ...)
    assert [leaf.shape for leaf in jax.tree.leaves(learns)] == [(2, 16)]
    before, after = (jax.tree.leaves(x) for x in (nnx.state(encoder), rest))
    assert len(before) == len(after)
    rows = np.asarray(new_rows(added)) + np.arange(32, dtype=np.float32).reshape(2, 16)
    longer = with_rows(encoder, rows)
    table = np.asarray(longer.text_model.embeddings.token_embedding.embedding[...])
    assert table.shape == (562, 16) and np.array_equal(table[560:], rows)
    np.testing.assert_array_equal(longer(IDS).last_hidden_state, states)
    plain = merge(added)(NEW).last_hidden_state
    np.testing.assert_array_equal(with_rows(encoder, new_rows(added))(NEW).last_hidden_state, plain)


def test_what_has_no_place_is_refused(encoder):
    with pytest.raises(ValueError, match="rows of width 3, expected 16"):
        with_rows(encoder, np.zeros((1, 3), np.float32))
    with pytest.raises(ValueError, match="has new rows"):
        new_rows(encoder)
    with pytest.raises(ValueError, match="no token_embedding in this network"):
        with_rows(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), np.zeros((1, 16), np.float32))
