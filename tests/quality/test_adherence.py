"""How closely images follow conditions: known agreements and known disagreements."""

import numpy as np
import pytest

from jaxsynth.data.conditions import make_condition
from jaxsynth.data.procedural.scenes import render_scenes
from jaxsynth.quality.adherence import MEASURES, agreement, edge_f1, psnr, region_iou


@pytest.mark.parametrize("kind", sorted(MEASURES))
def test_images_agree_with_their_own_conditions_and_less_with_others(kind):
    scenes = render_scenes(12, 32, 0)
    maps = {"depth": scenes.depths, "segmentation": scenes.labels, "mask": scenes.masks}
    partners = maps.get(kind, [None] * len(scenes))
    conditions = np.stack(
        [
            make_condition(kind, image, partner=partner)
            for image, partner in zip(scenes.images, partners, strict=True)
        ]
    )
    own = agreement(kind, scenes.images, conditions)
    other = agreement(kind, scenes.images, np.roll(conditions, 1, axis=0))
    least = {"edges": 1.0, "low_resolution": 58.9}.get(kind, 0.85)
    assert own.shape == (12,) and own.min() >= least - 0.1 and own.mean() >= least
    assert own.mean() > 1.5 * other.mean() and (own > other).all()


def test_edges_may_be_a_pixel_off():
    line = np.zeros((8, 8), bool)
    line[:, 3] = True
    moved, far = np.roll(line, 1, axis=1), np.roll(line, 2, axis=1)
    assert edge_f1(moved, line) == 1 and edge_f1(far, line) == 0 and edge_f1(far, line, reach=2)
    half = line.copy()
    half[:3] = False
    # All 5 found are right, and 6 of 8 wanted are near one.
    assert edge_f1(half, line) == pytest.approx(2 * 0.75 / 1.75)
    nothing = np.zeros_like(line)
    assert edge_f1(nothing, nothing) == 1 and edge_f1(nothing, line) == edge_f1(line, nothing) == 0


def test_psnr_is_the_error_on_a_scale_of_ten():
    zeros = np.zeros((4, 4, 3), np.float32)
    assert psnr(zeros + 0.1, zeros) == pytest.approx(20, abs=1e-3)
    assert psnr(zeros, zeros) == pytest.approx(58.9, abs=0.05)


def test_regions_count_where_colours_change():
    regions = np.repeat([0, 0, 5, 5], 4).reshape(4, 4)
    image = np.where(regions[..., None] == 5, [200, 10, 10], [10, 10, 200]).astype(np.uint8)
    assert region_iou(image, regions) == 1
    image[2, 0] = image[0, 0]
    # 8 of 9 pixels, and 7 of 8.
    assert region_iou(image, regions) == pytest.approx((8 / 9 + 7 / 8) / 2)
    # One colour is all of the first region's.
    assert region_iou(np.zeros((4, 4, 3), np.uint8), regions) == pytest.approx(0.25)


def test_wrong_kinds_and_shapes_are_named():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="condition 'canny': expected one of"):
        agreement("canny", images, np.zeros((2, 4, 4, 1)))
    with pytest.raises(ValueError, match=r"edges: conditions of shape \(2, 4, 4, 3\)"):
        agreement("edges", images, np.zeros((2, 4, 4, 3)))
