"""Search for the nearest rendering of an image over all named scenes and jitters.

The search has three stages: the background; every object at half resolution in closed form (inner
products with a bank of coverage layers); a few candidates at full resolution with the renderer.
"""

import functools
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import torch

from dopsd.pocket.metrics.pixels import blurred, rmse
from dopsd.pocket.world.captions import Stated
from dopsd.pocket.world.outlines import CLASSES, OUTLINES
from dopsd.pocket.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    HORIZON,
    PLACES,
    SIZE,
    SIZES,
    STYLES,
    Jitter,
    Scene,
    backdrop,
    layers,
    render,
)

# Attributes and their values. All but the background are axes of the object table, in this
# order.
VALUES: dict[str, tuple[str, ...]] = {
    "noun": tuple(OUTLINES),
    "size": tuple(SIZES),
    "place": tuple(PLACES),
    "colour": tuple(COLOURS),
    "style": tuple(STYLES),
    "background": tuple(BACKGROUNDS),
}
OBJECT_AXES = tuple(VALUES)[:5]
# The ranges of scenes.draw_jitter in the order of Jitter's fields: dx, dy, scale, turn, shade,
# shade_behind.
LOWEST = np.array((-3.0, -3.0, 0.9, -0.12, 0.88, 0.9))
HIGHEST = np.array((3.0, 3.0, 1.1, 0.12, 1.06, 1.06))
# The bank's grid; turns in radians, shifts in pixels.
SCALES, TURNS, SHIFTS = (0.93, 1.0, 1.07), (-0.08, 0.0, 0.08), (-2, 0, 2)
GRID = [
    Jitter(x, y, scale, turn) for y in SHIFTS for x in SHIFTS for scale in SCALES for turn in TURNS
]
POLISH = (0.1, 0.1, 0.006, 0.03)  # steps of the coordinate descent: dx, dy, scale, turn
BLURS = (0.0, 0.8, 1.6)  # Gaussian sigmas in pixels that a reading may have
PIXELS = np.arange(SIZE, dtype=np.float32) + np.float32(0.5)  # pixel centres along one side
CANDIDATES = 6
ALIKE = 0.004  # below this RMSE a fit is not polished
# An image farther than this (RMSE after blur) from every named scene shows something without a
# name.
UNLIKE = 0.03


@dataclass(frozen=True)
class Reading:
    """scene: of the nearest rendering, with its jitter. rmse: in [0, 1]. blur: sigma in pixels at
    which it is nearest."""

    scene: Scene
    rmse: float
    blur: float


def allowed(attribute: str, stated: Stated) -> tuple[str, ...]:
    value = stated.get(attribute)
    if value is None:
        return VALUES[attribute]
    return CLASSES.get(value, (value,)) if attribute == "noun" else (value,)


@functools.cache
def _backdrops() -> torch.Tensor:
    """Every background at half resolution, [6, 3, 1024] in [0, 1]."""
    return torch.tensor(
        np.stack([backdrop(name)[::2, ::2].reshape(-1, 3).T for name in BACKGROUNDS])
    ).float()


def backgrounds(
    small: torch.Tensor, stated: Sequence[Stated]
) -> tuple[list[str], list[float], torch.Tensor]:
    """Name, shade and half-resolution pixels [N, 3, 1024] of each image's background.

    The error is that of the best 60% of the pixels: an object covers less than 40%.
    """
    shades = torch.linspace(LOWEST[5], HIGHEST[5], 9)
    shaded = _backdrops()[:, None, :, ::3] * shades[:, None, None]
    errors = (small[:, None, None, :, ::3] - shaded).square().sum(3)
    trimmed = errors.topk(errors.shape[-1] * 6 // 10, largest=False).values.mean(-1)
    for k, statement in enumerate(stated):
        excluded = [name not in allowed("background", statement) for name in BACKGROUNDS]
        trimmed[k, excluded] = torch.inf
    which = trimmed.amin(2).argmin(1)
    plain = _backdrops()[which]
    rough = shades[trimmed[torch.arange(len(small)), which].argmin(1)]
    errors = (small - plain * rough[:, None, None]).square().sum(1)
    visible = (errors <= errors.quantile(0.6, dim=1, keepdim=True))[:, None] * plain
    shade = ((small * visible).sum((1, 2)) / (plain * visible).sum((1, 2))).clamp(
        LOWEST[5], HIGHEST[5]
    )
    return [VALUES["background"][k] for k in which], shade.tolist(), plain * shade[:, None, None]


@functools.cache
def bank() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Coverage at half resolution of every noun, size, place and jitter of GRID, in this order (G
    rows).

    Returns the layers [3, G, 1024] (the whole object, its second colour when striped, its ink when
    inked) and their inner products by initials, each [2, G]: above and below the horizon.
    """
    margin = 14
    windows = []
    for noun in OUTLINES:
        for size in SIZES:
            shapes = [
                _shape_layers(Scene(noun, size=size, jitter=Jitter(0, 0, s, t)))
                for s in SCALES
                for t in TURNS
            ]
            padded = np.pad(np.stack(shapes), ((0, 0), (0, 0), (margin, margin), (margin, margin)))
            for x, y in PLACES.values():
                for top in (margin + (SIZE // 2 - y - shift) // 2 for shift in SHIFTS):
                    for left in (margin + (SIZE // 2 - x - shift) // 2 for shift in SHIFTS):
                        window = padded[..., top : top + SIZE // 2, left : left + SIZE // 2]
                        windows.append(window.reshape(len(shapes), 3, -1))
    rows = torch.from_numpy(np.concatenate(windows)).permute(1, 0, 2).contiguous()
    initials, halves = (
        "osi",
        rows.split([HORIZON // 2 * SIZE // 2, (SIZE - HORIZON) // 2 * SIZE // 2], dim=2),
    )
    pairs = {
        a + b: (initials.index(a), initials.index(b)) for a, b in ("oo", "os", "oi", "ss", "ii")
    }
    return rows, {
        k: torch.stack([(half[a] * half[b]).sum(1) for half in halves])
        for k, (a, b) in pairs.items()
    }


def _shape_layers(scene: Scene) -> np.ndarray:
    """Whole object, second colour when striped and ink when inked, float32 [3, 32, 32]."""
    first, _, ink = layers(replace(scene, style="inked"))
    second = layers(replace(scene, style="striped"))[1]
    stack = np.stack([first + ink, second, ink])
    return stack.reshape(3, SIZE // 2, 2, SIZE // 2, 2).mean((2, 4), dtype=np.float32)


def object_table(small: torch.Tensor, behind: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The squared error of every object on the given background, minimised over GRID and shade, and
    the index in GRID.

    With p the image, b the background, o s i the layers and f = o - s - i the first colour's, a
    rendering is b (1 - o) + i ink + shade (f colour + s second). So |p - rendering|^2 = |q|^2 - 2
    shade <q, x> + shade^2 <x, x> for q = p - b (1 - o) - i ink and x = f colour + s second, which
    needs only inner products of p with the bank. Both results are [N, noun, size, place, colour,
    style]. b is constant above and below the horizon.
    """
    rows, products = bank()
    rest = small - behind
    planes = torch.cat([rest, (rest * behind).sum(1, keepdim=True)], 1)
    dots = (planes.flatten(0, 1) @ rows.flatten(0, 1).T).reshape(len(small), 4, 3, -1)
    halves = behind[:, :, [0, -1]]
    over = {pair: halves @ product for pair, product in products.items()}  # <a b, b> [N, 3, G]
    plain = {pair: product.sum(0) for pair, product in products.items()}  # <a, b> [G]
    uncovered = (
        rest.square().sum((1, 2))[:, None]
        + 2 * dots[:, 3, 0]
        + halves.square().sum(1) @ products["oo"]
    )
    colours = torch.tensor(list(COLOURS.values()))
    errors, jitters = [], []
    for look in STYLES.values():
        s, i = float(look.pattern != "plain"), float(look.ink_width > 0)  # no named style has both
        second, ink = torch.tensor(look.second), torch.tensor(look.ink)
        q_first = (
            dots[:, :3, 0]
            + over["oo"]
            - s * (dots[:, :3, 1] + over["os"])
            - i * (dots[:, :3, 2] + over["oi"])
        )
        q_first -= i * ink[:, None] * (plain["oi"] - plain["ii"])
        q_second = s * torch.einsum("ncg,c->ng", dots[:, :3, 1] + over["os"], second)
        qq = uncovered + i * (ink.square().sum() * plain["ii"])
        qq -= 2 * i * torch.einsum("ncg,c->ng", dots[:, :3, 2] + over["oi"], ink)
        qx = torch.einsum("ncg,kc->ngk", q_first, colours) + q_second[..., None]
        ff = plain["oo"] - s * (2 * plain["os"] - plain["ss"]) - i * (2 * plain["oi"] - plain["ii"])
        xx = (
            ff[:, None] * colours.square().sum(1) + s * plain["ss"][:, None] * second.square().sum()
        )
        xx += 2 * s * (plain["os"] - plain["ss"])[:, None] * (colours @ second)
        shade = (qx / xx.clamp_min(1e-6)).clamp(LOWEST[4], HIGHEST[4])
        error = qq[..., None] + shade * (shade * xx - 2 * qx)
        best = error.clamp_min(0).unflatten(1, (-1, len(GRID))).min(2)
        errors.append(best.values)
        jitters.append(best.indices)
    shape = (len(OUTLINES), len(SIZES), len(PLACES))
    return torch.stack(errors, -1).unflatten(1, shape), torch.stack(jitters, -1).unflatten(1, shape)


def candidates(
    errors: torch.Tensor,
    jitters: torch.Tensor,
    stated: Stated,
    background: str,
    shade_behind: float,
) -> list[Scene]:
    """Up to CANDIDATES nearest scenes of an image's object table that agree with the statement.

    Scenes with more than twice the least squared error are left out. (On 300 images the true scene
    had at most 1.2 times the least error under a blur of 1.2 pixels, and was always first without
    blur.)
    """
    free = torch.zeros_like(errors, dtype=torch.bool)
    free[np.ix_(*([VALUES[a].index(v) for v in allowed(a, stated)] for a in OBJECT_AXES))] = True
    best = errors.masked_fill(~free, torch.inf).flatten().topk(CANDIDATES, largest=False)
    scenes = []
    for flat in best.indices[best.values <= 2 * best.values[0]].tolist():
        cell = np.unravel_index(flat, errors.shape)
        named = {axis: VALUES[axis][k] for axis, k in zip(OBJECT_AXES, cell, strict=True)}
        jitter = replace(GRID[int(jitters[cell])], shade_behind=shade_behind)
        scenes.append(Scene(**named, background=background, jitter=jitter))
    return scenes


def nearest(image: np.ndarray, scenes: Sequence[Scene]) -> Reading:
    """The candidate that is nearest to the image [64, 64, 3] in [0, 1] after refining jitters."""
    refined = []
    for rough in scenes:
        scene, _ = _refined(image, rough, 0.0, steps=2)
        drawn = render(scene) / np.float32(255)
        blur = min(BLURS, key=lambda sigma: rmse(image, blurred(drawn, sigma)))
        refined.append((*_refined(image, scene, blur, steps=6), blur))
    scene, error, blur = min(refined, key=lambda candidate: candidate[1])
    if not blur and ALIKE < error < UNLIKE:
        scene = _polished(image, scene, error)
    return Reading(scene, rmse(image, render(scene) / np.float32(255)), blur)


def _refined(image: np.ndarray, scene: Scene, blur: float, steps: int) -> tuple[Scene, float]:
    """The scene with its jitter fitted by damped Gauss-Newton steps, and its RMSE."""
    cover, drawn = _drawn(scene, blur)
    error = rmse(image, drawn)
    for _ in range(steps):
        slopes = _slopes(scene, cover, blur)
        normal = slopes @ slopes.T
        normal += np.diag(0.01 * np.diag(normal) + 1e-6)
        step = np.linalg.solve(normal, slopes @ (image - drawn).ravel())
        before = error
        for share in (1.0, 0.5, 0.2):
            values = np.clip(np.array(astuple(scene.jitter)) + share * step, LOWEST, HIGHEST)
            trial = replace(scene, jitter=Jitter(*map(float, values)))
            trial_cover, trial_drawn = _drawn(trial, blur)
            trial_error = rmse(image, trial_drawn)
            if trial_error < error:
                scene, cover, drawn, error = trial, trial_cover, trial_drawn, trial_error
                break
        if error > 0.98 * before:
            break
    return scene, error


def _polished(image: np.ndarray, scene: Scene, error: float) -> Scene:
    """The scene after coordinate descent on offset, scale and turn. Outlines are drawn on whole
    subpixels, so that sharp images have local minima that gradients do not show."""
    for share in (1.0, 0.4):
        for step in (*np.diag(POLISH[:4]), *-np.diag(POLISH[:4])):
            values = np.array(astuple(scene.jitter))
            values[:4] += share * step
            trial = replace(scene, jitter=Jitter(*map(float, np.clip(values, LOWEST, HIGHEST))))
            trial_error = rmse(image, _drawn(trial, 0.0)[1])
            if trial_error < error:
                scene, error = trial, trial_error
    return scene


def _colours_of(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Shaded colours of the three layers, [3, 3], and the shaded background, [4096, 3]; float32."""
    look, jitter = STYLES[scene.style], scene.jitter
    front = np.array((COLOURS[scene.colour], look.second, look.ink), dtype=np.float32)
    front[:2] *= jitter.shade
    return front, (backdrop(scene.background) * jitter.shade_behind).astype(np.float32).reshape(
        -1, 3
    )


def _drawn(scene: Scene, blur: float) -> tuple[np.ndarray, np.ndarray]:
    """The scene's coverage layers [3, 4096], and its float32 drawing [64, 64, 3] under the blur."""
    cover = np.stack(layers(scene)).reshape(3, -1)
    front, behind = _colours_of(scene)
    drawn = behind * (1 - cover.sum(0))[:, None] + cover.T @ front
    return cover, blurred(np.clip(drawn, 0, 1).reshape(SIZE, SIZE, 3), blur)


def _slopes(scene: Scene, cover: np.ndarray, blur: float) -> np.ndarray:
    """Derivatives of the blurred drawing with respect to the six jitters, [6, 12288], for layers
    that move rigidly."""
    front, behind = _colours_of(scene)
    jitter = scene.jitter
    down = np.asarray(np.gradient(cover.reshape(3, SIZE, SIZE), axis=1))
    right = np.asarray(np.gradient(cover.reshape(3, SIZE, SIZE), axis=2))
    centre_x, centre_y = PLACES[scene.place]
    x = PIXELS - np.float32(centre_x + jitter.dx)
    y = (PIXELS - np.float32(centre_y + jitter.dy))[:, None]
    moves = np.stack(
        [-right, -down, -(x * right + y * down) / np.float32(jitter.scale), y * right - x * down]
    )
    slopes = np.empty((6, SIZE * SIZE, 3), dtype=np.float32)
    moves = moves.reshape(4, 3, -1)
    slopes[:4] = moves.transpose(0, 2, 1) @ front - behind * moves.sum(1)[..., None]
    slopes[4] = cover[:2].T @ front[:2] / np.float32(jitter.shade)
    slopes[5] = behind * ((1 - cover.sum(0)) / np.float32(jitter.shade_behind))[:, None]
    return blurred(slopes.reshape(6, SIZE, SIZE, 3), blur).reshape(6, -1)
