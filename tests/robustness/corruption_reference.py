"""ImageNet-C written from its formulas with NumPy, SciPy and Pillow, for one image at 224 pixels.

Noise comes in from outside, in the form that the library's functions take it.
"""

import colorsys
import io

import numpy as np
from PIL import Image
from scipy import ndimage, stats

SIZE = 224


def gaussian_noise(x, noise, level):
    return np.clip(x + noise * [0.08, 0.12, 0.18, 0.26, 0.38][level], 0, 1)


def speckle_noise(x, noise, level):
    return np.clip(x + x * noise * [0.15, 0.2, 0.35, 0.45, 0.6][level], 0, 1)


def impulse_noise(x, noise, level):
    share = [0.03, 0.06, 0.09, 0.17, 0.27][level]
    x = x.copy()
    x[noise < share] = 1
    x[noise < share / 2] = 0
    return x


def shot_noise(x, noise, level):
    return poisson(x, noise, [60, 25, 12, 5, 3][level])


def poisson(x, noise, most):
    return np.clip(stats.poisson.ppf(noise, x * most) / most, 0, 1)


def smooth(x, sigma):
    sigmas = (sigma, sigma, 0)[: x.ndim]
    return ndimage.gaussian_filter(x, sigmas, mode="nearest", truncate=4)


def gaussian_blur(x, noise, level):
    return np.clip(smooth(x, [1, 2, 3, 4, 6][level]), 0, 1)


def defocus_blur(x, noise, level):
    radius, sigma = [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)][level]
    reach, half = (8, 1) if radius <= 8 else (radius, 2)
    y, z = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (y**2 + z**2 <= radius**2).astype(float)
    disk /= disk.sum()
    taps = np.exp(-(np.arange(-half, half + 1.0) ** 2) / (2 * sigma**2))
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, taps / taps.sum(), axis, mode="mirror")
    x = np.stack([ndimage.correlate(x[..., c], disk, mode="mirror") for c in range(3)], -1)
    # Where the disk ends with its grid, mirroring adds to its sum.
    return np.clip(x, 0, 1)


def glass_blur(x, noise, level):
    sigma, far, passes = [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)][level]
    # Which way a flat area goes would be up to the last bit.
    x = np.uint8(smooth(x, sigma) * 255 + 1e-3)
    moves = np.floor(noise * np.float32((2 * far) ** 2)).astype(int)
    for number in range(passes):
        for h in range(SIZE - far, far, -1):
            for w in range(SIZE - far, far, -1):
                right, down = (move - far for move in divmod(moves[number, h, w], 2 * far))
                # As the generator has it: views, so that this copies and does not swap.
                x[h, w], x[h + down, w + right] = x[h + down, w + right], x[h, w]
    return np.clip(smooth(x / 255, sigma), 0, 1)


def motion(x, radius, sigma, angle):
    width = 2 * radius + 1
    weights = np.exp(-(np.arange(width) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    around = np.pad(x, ((width, width), (width, width), (0, 0))[: x.ndim], mode="edge")
    out = np.zeros_like(x)
    for i, weight in enumerate(weights):
        right = int(np.ceil(i * np.cos(np.deg2rad(angle)) - 0.5))
        down = int(np.ceil(i * np.sin(np.deg2rad(angle)) - 0.5))
        rows = slice(width + down, width + down + x.shape[0])
        out += weight * around[rows, width + right : width + right + x.shape[1]]
    return out


def motion_blur(x, noise, level):
    return motion(x, *[(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)][level], noise)


def clipped_zoom(x, factor):
    crop = int(np.ceil(SIZE / factor))
    top = (SIZE - crop) // 2
    factors = (factor, factor, 1)[: x.ndim]
    zoomed = ndimage.zoom(x[top : top + crop, top : top + crop], factors, order=1)
    trim = (zoomed.shape[0] - SIZE) // 2
    return zoomed[trim : trim + SIZE, trim : trim + SIZE]


def zoom_blur(x, noise, level):
    end, step = [(1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)][level]
    factors = np.arange(1, end, step)
    assert len(factors) == [12, 16, 11, 13, 11][level]
    return (x + sum(clipped_zoom(x, factor) for factor in factors)) / (len(factors) + 1)


def plasma(noise, decay, side=256):
    noise, used = np.asarray(noise, np.float64), 0
    grid, step, wobble = np.zeros((side, side)), side, 100.0

    def wobbled(total):
        nonlocal used
        used += total.size
        return total / 4 + wobble * wobble * noise[used - total.size : used].reshape(total.shape)

    while step >= 2:
        half = step // 2
        corners = grid[::step, ::step]
        right = np.roll(corners, -1, 1)
        below, across = np.roll(corners, -1, 0), np.roll(right, -1, 0)
        grid[half::step, half::step] = middle = wobbled(corners + right + below + across)
        grid[::step, half::step] = wobbled(middle + np.roll(middle, 1, 0) + corners + right)
        grid[half::step, ::step] = wobbled(middle + np.roll(middle, 1, 1) + corners + below)
        step, wobble = half, wobble / decay
    grid -= grid.min()
    return grid / grid.max()


def fog(x, noise, level):
    amount, decay = [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)][level]
    most = x.max()
    x = x + amount * plasma(noise, decay)[:SIZE, :SIZE, None]
    return np.clip(x * most / (most + amount), 0, 1)


def snow(x, noise, level):
    mean, deviation, zoom, least, radius, sigma, weight = [
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ][level]
    layer = clipped_zoom(mean + deviation * np.asarray(noise.flakes, np.float64), zoom)
    layer[layer < least] = 0
    layer = (np.clip(layer, 0, 1) * 255).astype(np.uint8) / 255
    layer = motion(layer, radius, sigma, noise.angle)[..., None]
    grey = (x @ [0.299, 0.587, 0.114])[..., None]
    x = weight * x + (1 - weight) * np.maximum(x, grey * 1.5 + 0.5)
    return np.clip(x + layer + np.rot90(layer, 2), 0, 1)


def spatter(x, noise, level):
    mean, deviation, sigma, least, last = [
        (0.65, 0.3, 4, 0.69, 0.6),
        (0.65, 0.3, 3, 0.68, 0.6),
        (0.65, 0.3, 2, 0.68, 0.5),
        (0.65, 0.3, 1, 0.65, 1.5),
        (0.67, 0.4, 1, 0.65, 1.5),
    ][level]
    layer = smooth(mean + deviation * noise.astype(np.float64), sigma)
    layer[layer < least] = 0
    if level > 2:
        mask = smooth((layer > least).astype(float), last)
        mask[mask < 0.8] = 0
        return x * (1 - mask[..., None]) + mask[..., None] * np.array([63, 42, 20]) / 255
    layer = np.clip(layer * 255, 0, 255).astype(np.uint8)
    distance = np.minimum(chamfer(canny(layer, 50, 150)), 20)
    level8 = equalise(ndimage.correlate(distance, np.ones((3, 3)) / 9, mode="mirror") + 1e-9)
    kernel = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    relief = np.clip(ndimage.correlate(level8, kernel, mode="mirror"), 0, 255)
    relief = np.round(ndimage.correlate(relief, np.ones((3, 3)) / 9, mode="mirror"))
    strength = layer * relief
    strength *= last / strength.max()
    return np.clip(x + strength[..., None] * np.array([175, 238, 238]) / 255, 0, 1)


def canny(layer, low, high):
    """Pixel by pixel, by the direction of the slope; weak lines that hold a strong pixel stay."""
    layer = layer.astype(int)
    right, down = (ndimage.sobel(layer, axis, mode="nearest") for axis in (1, 0))
    size = np.pad(np.abs(right) + np.abs(down), 1)
    thin = np.zeros(layer.shape, bool)
    tangent = 13573 / 2**15
    for y, x in zip(*np.nonzero(size[1:-1, 1:-1] > low), strict=True):
        here = size[y : y + 3, x : x + 3]
        flat, steep = abs(right[y, x]), abs(down[y, x])
        if steep < tangent * flat:
            thin[y, x] = here[1, 1] > here[1, 0] and here[1, 1] >= here[1, 2]
        elif steep > (tangent + 2) * flat:
            thin[y, x] = here[1, 1] > here[0, 1] and here[1, 1] >= here[2, 1]
        elif (right[y, x] < 0) == (down[y, x] < 0):
            thin[y, x] = here[1, 1] > here[0, 0] and here[1, 1] > here[2, 2]
        else:
            thin[y, x] = here[1, 1] > here[0, 2] and here[1, 1] > here[2, 0]
    lines, _ = ndimage.label(thin, np.ones((3, 3)))
    strong = thin & (size[1:-1, 1:-1] > high)
    return np.isin(lines, np.unique(lines[strong])) & thin


def chamfer(edges):
    """Least cost of 1, 1.4 and 2.1969 for sideways, diagonal and knight's moves to an edge."""
    y, x = np.nonzero(edges)
    out = np.full(edges.shape, np.inf)
    rows, columns = np.indices(edges.shape)
    for ey, ex in zip(y, x, strict=True):
        near = np.s_[max(ey - 21, 0) : ey + 22, max(ex - 21, 0) : ex + 22]
        a, b = np.abs(rows[near] - ey), np.abs(columns[near] - ex)
        a, b = np.maximum(a, b), np.minimum(a, b)
        cost = np.where(2 * b <= a, (a - 2 * b) + 2.1969 * b, (2 * b - a) * 1.4 + (a - b) * 2.1969)
        out[near] = np.minimum(out[near], cost)
    return out


def equalise(level):
    level = level.astype(int)
    counts = np.bincount(level.ravel(), minlength=256)
    first = np.flatnonzero(counts)[0]
    table = np.cumsum(counts) - counts[first]
    return np.round(table * 255 / (level.size - counts[first]))[level]


def brightness(x, noise, level):
    def change(h, s, v):
        return h, s, min(1, v + [0.1, 0.2, 0.3, 0.4, 0.5][level])

    return in_hsv(x, change)


def saturate(x, noise, level):
    factor, addend = [(0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)][level]
    return in_hsv(x, lambda h, s, v: (h, min(1, s * factor + addend), v))


def in_hsv(x, change):
    flat = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*p))) for p in x.reshape(-1, 3)]
    return np.array(flat).reshape(x.shape)


def contrast(x, noise, level):
    mean = x.mean((0, 1))
    return np.clip((x - mean) * [0.4, 0.3, 0.2, 0.1, 0.05][level] + mean, 0, 1)


def jpeg_compression(x, noise, level):
    return jpeg(x, [25, 18, 15, 10, 7][level])


def jpeg(x, quality):
    file = io.BytesIO()
    Image.fromarray(np.uint8(np.round(x * 255))).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)) / 255


def pixelate(x, noise, level):
    image = Image.fromarray(np.uint8(np.round(x * 255)))
    small = [134, 112, 89, 67, 56][level]
    image = image.resize((small, small), Image.Resampling.BOX)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX)) / 255


def elastic_transform(x, noise, level):
    strength, smoothness, jitter = (
        244
        * np.array(
            [
                (2, 0.7, 0.1),
                (2, 0.08, 0.2),
                (0.05, 0.01, 0.02),
                (0.07, 0.01, 0.02),
                (0.12, 0.01, 0.02),
            ]
        )[level]
    )
    middle, side = SIZE // 2, SIZE // 3
    before = middle + side * np.array([[1, 1], [1, -1], [-1, -1]])
    after = before + jitter * noise.corners.astype(np.float64)
    # The map from the moved points back, as (x, y, 1) to (x, y).
    back = np.linalg.solve(np.c_[after, np.ones(3)], before.astype(float))
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(float)
    source = np.stack([columns, rows, np.ones_like(rows)], -1) @ back
    x = sampled(x, source[..., 1], source[..., 0], "mirror")
    right, down = (
        strength
        * ndimage.gaussian_filter(n.astype(np.float64), smoothness, mode="reflect", truncate=3)
        for n in (noise.right, noise.down)
    )
    return np.clip(sampled(x, rows + down, columns + right, "reflect"), 0, 1)


def sampled(x, rows, columns, mode):
    return np.stack(
        [ndimage.map_coordinates(x[..., c], [rows, columns], order=1, mode=mode) for c in range(3)],
        -1,
    )
