"""Cosines of features: over all pairs, row by row, and of texts as CLIP computes them."""

import numpy as np
import torch
import transformers

from jaxsynth.quality.similarity import class_spread, mean_cosine, paired_cosine, text_features
from jaxsynth.weights.hf import load_clip


def test_cosines_are_those_of_pairs():
    rng = np.random.default_rng(0)
    one, other = rng.standard_normal((4, 6)), rng.standard_normal((3, 6))
    cosine = np.array([[x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in other] for x in one])
    np.testing.assert_allclose(mean_cosine(one, other), cosine.mean(1), atol=1e-6)
    np.testing.assert_allclose(paired_cosine(one[:3], other), np.diag(cosine[:3]), atol=1e-6)


def test_texts_are_those_of_transformers(base_folder):
    texts = ("a photo of the digit one", "zero")
    clip = load_clip(base_folder / "clip")
    peer = transformers.CLIPModel.from_pretrained(base_folder / "clip")
    with torch.no_grad():
        pooled = peer.text_model(torch.tensor(clip.tokenizer(texts))).pooler_output
        expected = peer.text_projection(pooled).numpy()
    np.testing.assert_allclose(text_features(clip, texts), expected, atol=1e-5)


def test_spread_within_classes_is_the_distance_from_their_means():
    labels = np.array([0, 0, 1, 1])
    alike = np.array([[1.0, 0], [3, 0], [0, 1], [0, 2]])
    assert class_spread(alike, labels) == 0
    apart = np.array([[1.0, 0], [0, 5], [0, 1], [0, 2]])
    # Of class 0 the mean is (1/2, 1/2), sqrt(1/2) from both; class 1 is one direction.
    np.testing.assert_allclose(class_spread(apart, labels), np.sqrt(0.5) / 2, rtol=1e-6)
