"""Reads from pixels alone what a pocket picture shows: its attributes, its sharpness, its things. No network.

A picture is read as its nearest rendering over all named scenes and jitters. The search is factorised: background
first, then every object at half resolution in closed form (inner products with a bank of coverage layers), then a
few candidates at full resolution with the real renderer. Pictures everywhere: uint8 [N, 64, 64, 3].
"""

import functools
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import torch
from torch.nn.functional import avg_pool2d

from dopsd.pocket.captions import Stated
from dopsd.pocket.outlines import CLASSES, OUTLINES
from dopsd.pocket.world import (
    BACKGROUNDS,
    COLOURS,
    HORIZON,
    PLACES,
    SIZE,
    SIZES,
    STYLES,
    Jitter,
    Scene,
    Thing,
    backdrop,
    layers,
    render,
)

# What can be stated, and its values. All but the background are the axes of the table of objects, in this order.
VALUES: dict[str, tuple[str, ...]] = {
    "noun": tuple(OUTLINES),
    "size": tuple(SIZES),
    "place": tuple(PLACES),
    "colour": tuple(COLOURS),
    "style": tuple(STYLES),
    "background": tuple(BACKGROUNDS),
}
OBJECT_AXES = tuple(VALUES)[:5]
# The ranges of world.draw_jitter, in the order of Jitter's fields: dx, dy, scale, turn, shade, shade_behind.
LOWEST = np.array((-3.0, -3.0, 0.9, -0.12, 0.88, 0.9))
HIGHEST = np.array((3.0, 3.0, 1.1, 0.12, 1.06, 1.06))
SCALES, TURNS, SHIFTS = (0.93, 1.0, 1.07), (-0.08, 0.0, 0.08), (-2, 0, 2)  # the bank's grid; shifts in pixels
GRID = [Jitter(x, y, scale, turn) for y in SHIFTS for x in SHIFTS for scale in SCALES for turn in TURNS]
POLISH = (0.1, 0.1, 0.006, 0.03)  # steps of the last coordinate descent: dx, dy, scale, turn
BLURS = (0.0, 0.8, 1.6)  # Gaussian sigmas in pixels that a reading forgives
PIXELS = np.arange(SIZE, dtype=np.float32) + np.float32(0.5)  # their middles along one side
BATCH = 8  # pictures whose tables of objects are in memory at once
CANDIDATES = 6
ALIKE = 0.004  # below this RMSE a fit needs no polish
UNLIKE = 0.03  # a picture further than this (RMSE, blur forgiven) from every named scene shows something nameless
VISIBLE = 0.12  # RGB distance from the background beyond which a pixel belongs to the object
THING_RADIUS = 16.2  # pixels, the farthest point of a thing from its middle: small < 14.8, big > 17.4 (400 seeds)
CONTOUR = 2  # pixels along the outline that may be ink and have no vote on the colour
NOT_A_NOUN = 0.1  # share of a silhouette's area by which it may differ from a named outline


@dataclass(frozen=True)
class Reading:
    """The nearest rendering's scene, jitter included; its RMSE in [0, 1]; the blur (pixels) that was forgiven."""

    scene: Scene
    rmse: float
    blur: float


@dataclass(frozen=True)
class Attributes:
    """How far pictures show what was stated of them.

    share: of the stated attributes that read right, over all pictures. all_right: share of the pictures that state
    anything and show all of it. chance: expected `share` of a uniform guesser. right and chances [N, 6], in the order
    of VALUES: 1 or 0 and the guesser's probability, NaN where unstated.
    """

    share: float
    all_right: float
    chance: float
    right: np.ndarray
    chances: np.ndarray

    @property
    def per_picture(self) -> np.ndarray:
        """Share of its stated attributes that each picture shows, [N]; NaN where nothing is stated."""
        stated = ~np.isnan(self.right)
        with np.errstate(invalid="ignore"):
            return np.nansum(self.right, axis=1) / stated.sum(1)


@dataclass(frozen=True)
class PictureMeasures:
    """All that one search gives. readings are free of the statements; sharpness and speckle are [N]."""

    attributes: Attributes
    sharpness: np.ndarray
    speckle: np.ndarray
    readings: list[Reading]


def read(pictures: np.ndarray, stated: Sequence[Stated] | None = None) -> list[Reading]:
    """The nearest rendering of each picture; with `stated`, the nearest among scenes consistent with it.

    Nearest in RMSE after the rendering is blurred as much as the picture (BLURS): an unsharp picture would else be
    read in duller colours. `rmse` itself is that of the sharp rendering.
    """
    statements = [{}] * len(pictures) if stated is None else stated
    readings: list[Reading] = []
    for start in range(0, len(pictures), BATCH):
        part, said = pictures[start : start + BATCH], statements[start : start + BATCH]
        pixels = torch.from_numpy(np.ascontiguousarray(part)).float().div(255).permute(0, 3, 1, 2)
        small = avg_pool2d(pixels, 2).flatten(2)
        names, shades, behind = _backgrounds(small, said)
        errors, jitters = _object_table(small, behind)
        for k in range(len(part)):
            scenes = _candidates(errors[k], jitters[k], said[k], names[k], shades[k])
            readings.append(_nearest(part[k] / np.float32(255), scenes))
    return readings


def measure(pictures: np.ndarray, stated: Sequence[Stated]) -> PictureMeasures:
    """Readings, attributes, sharpness and speckle in one search (a second one only where the reading is wrong)."""
    readings = read(pictures, None)
    consistent = list(readings)
    wrong = [k for k, r in enumerate(readings) if not _is_consistent(r.scene, stated[k])]
    for k, reading in zip(wrong, read(pictures[wrong], [stated[k] for k in wrong]), strict=True):
        consistent[k] = reading
    crispness = [_crispness(p, render(r.scene)) for p, r in zip(pictures, consistent, strict=True)]
    sharp, speckled = np.array(crispness).reshape(-1, 2).T
    return PictureMeasures(_attributes(pictures, readings, stated), sharp, speckled, readings)


def attributes(pictures: np.ndarray, stated: Sequence[Stated]) -> Attributes:
    """Which stated attributes the pictures show. A class noun ("tree") is right when the kind belongs to it."""
    return _attributes(pictures, read(pictures), stated)


def sharpness(pictures: np.ndarray, stated: Sequence[Stated]) -> np.ndarray:
    """Edge strength relative to the nearest consistent rendering, [N] in [0, 1]: min(1, G95 / G95 of the rendering).

    G95: the 95th percentile of the gradient (central differences, norm over x, y and RGB) within 2 pixels of that
    rendering's strong edges.
    """
    return measure(pictures, stated).sharpness


def speckle(pictures: np.ndarray, stated: Sequence[Stated]) -> np.ndarray:
    """Mean |Laplacian| of the RGB mean where the nearest consistent rendering is flat (3 pixels from edges), [N]."""
    return measure(pictures, stated).speckle


def thing_error(pictures: np.ndarray, scenes: Sequence[Scene]) -> np.ndarray:
    """RMSE in [0, 1], [N], between each picture and its true scene inside the object's mask grown by 2 pixels.

    The least over shifts of the picture by up to 2 pixels each way: where a thing stands is not what it is.
    """
    return np.array(
        [_shifted_errors(p, render(s)[None], _objects_mask([s]))[0] for p, s in zip(pictures, scenes, strict=True)]
    )


def thing_hit(pictures: np.ndarray, scenes: Sequence[Scene], distractor_seeds: Sequence[int]) -> np.ndarray:
    """Whether each picture is nearer to its scene's thing than to every distractor `Thing.from_seed`, bool [N].

    The error is thing_error's, but over one mask for all candidates, the union of theirs: every candidate answers for
    the same pixels, so that a small one does not win by answering for few. The union treats all candidates alike;
    a picture of another random thing therefore hits with probability 1 / (1 + distractors).
    """
    hits = []
    for picture, scene in zip(pictures, scenes, strict=True):
        rivals = [scene, *(replace(scene, thing=Thing.from_seed(seed)) for seed in distractor_seeds)]
        mask = _objects_mask(rivals)
        errors = _shifted_errors(picture, np.stack([render(rival) for rival in rivals]), mask)
        hits.append(errors[0] < errors[1:].min())
    return np.array(hits)


def bootstrap(values: np.ndarray, seed: int = 0, draws: int = 2000) -> tuple[float, float, float]:
    """Mean of values [N] and its 95% percentile interval over resampled pictures: (mean, low, high)."""
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(np.asarray(values, dtype=float)[picks].mean(1), (2.5, 97.5))
    return float(np.mean(values)), float(low), float(high)


# --- statements


def _allowed(attribute: str, stated: Stated) -> tuple[str, ...]:
    value = stated.get(attribute)
    if value is None:
        return VALUES[attribute]
    return CLASSES.get(value, (value,)) if attribute == "noun" else (value,)


def _is_consistent(scene: Scene, stated: Stated) -> bool:
    return all(getattr(scene, attribute) in _allowed(attribute, stated) for attribute in stated)


def _attributes(pictures: np.ndarray, readings: Sequence[Reading], stated: Sequence[Stated]) -> Attributes:
    right = np.full((len(readings), len(VALUES)), np.nan)
    chances = right.copy()
    for k, (reading, said) in enumerate(zip(readings, stated, strict=True)):
        shown = _shown(pictures[k] / np.float32(255), reading)
        for column, attribute in enumerate(VALUES):
            if attribute in said:
                allowed = _allowed(attribute, said)
                right[k, column] = getattr(shown, attribute) in allowed
                chances[k, column] = len(allowed) / len(VALUES[attribute])
    states_any = ~np.isnan(right).all(1)
    all_right = (right[states_any] != 0).all(1)
    return Attributes(
        _mean(right[~np.isnan(right)]), _mean(all_right), _mean(chances[~np.isnan(right)]), right, chances
    )


def _mean(values: np.ndarray) -> float:
    """The mean; NaN, without a warning, of nothing."""
    return float(values.mean()) if values.size else float("nan")


# --- what is nameless: read by its silhouette


def _shown(picture: np.ndarray, reading: Reading) -> Scene:
    """The scene whose attributes the picture shows: its reading, or what its silhouette says if that is far off."""
    nearest = _blurred(render(reading.scene) / np.float32(255), reading.blur)
    if _rmse(picture, nearest) < UNLIKE:
        return reading.scene
    visible = _visible(picture, reading.scene)
    if not visible.any():
        return reading.scene
    small = torch.from_numpy(visible.reshape(SIZE // 2, 2, SIZE // 2, 2).mean((1, 3), dtype=np.float32)).flatten()
    rows, products = _bank()
    area = products["oo"].sum(0)
    unlike = area - 2 * rows[0] @ small + small.square().sum()
    best = int(unlike.argmin())
    sizes = (len(OUTLINES), len(SIZES), len(PLACES), len(GRID))
    noun, size, place, _ = (int(k) for k in np.unravel_index(best, sizes))
    y, x = np.nonzero(visible)
    radius = np.hypot(y - y.mean(), x - x.mean()).max()
    if unlike[best] > NOT_A_NOUN * area[best]:  # no outline that has a name: things are told by their extent
        size = list(SIZES).index("big" if radius > THING_RADIUS else "small")
    named = {a: VALUES[a][k] for a, k in (("noun", noun), ("size", size), ("place", place))}
    inside = ~_grown(~visible, CONTOUR)
    return replace(reading.scene, colour=_commonest_colour(picture[inside if inside.any() else visible]), **named)


def _visible(picture: np.ndarray, scene: Scene) -> np.ndarray:
    """Pixels unlike the scene's background, bool [64, 64]. Any blend of its halves is background near the horizon."""
    behind = backdrop(scene.background) * scene.jitter.shade_behind
    upper, across = behind[0, 0], behind[-1, 0] - behind[0, 0]
    rows = slice(HORIZON - 4, HORIZON + 4)
    blend = np.clip((picture[rows] - upper) @ across / max(across @ across, 1e-6), 0, 1)
    behind[rows] = upper + blend[..., None] * across
    return np.linalg.norm(picture - behind, axis=2) > VISIBLE


def _commonest_colour(pixels: np.ndarray) -> str:
    """The named colour that most of the pixels [n, 3] show, each at its best common shade."""
    shades = np.linspace(LOWEST[4], HIGHEST[4], 7)
    shaded = np.array(list(COLOURS.values()))[:, None] * shades[:, None]
    near = np.linalg.norm(pixels[:, None, None] - shaded, axis=-1) < 0.06
    return VALUES["colour"][int(near.sum(0).max(1).argmax())]


# --- the search: background, table of objects, refinement


@functools.cache
def _backdrops() -> torch.Tensor:
    """Every background at half resolution, [6, 3, 1024] in [0, 1]."""
    return torch.tensor(np.stack([backdrop(name)[::2, ::2].reshape(-1, 3).T for name in BACKGROUNDS])).float()


def _backgrounds(small: torch.Tensor, stated: Sequence[Stated]) -> tuple[list[str], list[float], torch.Tensor]:
    """Name, shade and half-resolution pixels [N, 3, 1024] of each picture's background.

    By the error of the nearest 60% of the pixels: an object covers less than 40%.
    """
    shades = torch.linspace(LOWEST[5], HIGHEST[5], 9)
    shaded = _backdrops()[:, None, :, ::3] * shades[:, None, None]
    errors = (small[:, None, None, :, ::3] - shaded).square().sum(3)
    trimmed = errors.topk(errors.shape[-1] * 6 // 10, largest=False).values.mean(-1)
    for k, said in enumerate(stated):
        excluded = [name not in _allowed("background", said) for name in BACKGROUNDS]
        trimmed[k, excluded] = torch.inf
    which = trimmed.amin(2).argmin(1)
    plain = _backdrops()[which]
    rough = shades[trimmed[torch.arange(len(small)), which].argmin(1)]
    errors = (small - plain * rough[:, None, None]).square().sum(1)
    kept = (errors <= errors.quantile(0.6, dim=1, keepdim=True))[:, None] * plain
    shade = ((small * kept).sum((1, 2)) / (plain * kept).sum((1, 2))).clamp(LOWEST[5], HIGHEST[5])
    return [VALUES["background"][k] for k in which], shade.tolist(), plain * shade[:, None, None]


@functools.cache
def _bank() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Coverage at half resolution of every noun, size, place and jitter of GRID (G of them, in this order).

    rows [3, G, 1024]: the whole object, its second colour when striped, its ink when inked. And the inner products
    of these layers by their initials, [2, G]: above the horizon and below.
    """
    margin = 14
    windows = []
    for noun in OUTLINES:
        for size in SIZES:
            shapes = [_shape_layers(Scene(noun, size=size, jitter=Jitter(0, 0, s, t))) for s in SCALES for t in TURNS]
            padded = np.pad(np.stack(shapes), ((0, 0), (0, 0), (margin, margin), (margin, margin)))
            for x, y in PLACES.values():
                for top in (margin + (SIZE // 2 - y - shift) // 2 for shift in SHIFTS):
                    for left in (margin + (SIZE // 2 - x - shift) // 2 for shift in SHIFTS):
                        window = padded[..., top : top + SIZE // 2, left : left + SIZE // 2]
                        windows.append(window.reshape(len(shapes), 3, -1))
    rows = torch.from_numpy(np.concatenate(windows)).permute(1, 0, 2).contiguous()
    initials, halves = "osi", rows.split([HORIZON // 2 * SIZE // 2, (SIZE - HORIZON) // 2 * SIZE // 2], dim=2)
    pairs = {a + b: (initials.index(a), initials.index(b)) for a, b in ("oo", "os", "oi", "ss", "ii")}
    return rows, {k: torch.stack([(half[a] * half[b]).sum(1) for half in halves]) for k, (a, b) in pairs.items()}


def _shape_layers(scene: Scene) -> np.ndarray:
    """Whole object, second colour when striped and ink when inked, float32 [3, 32, 32]."""
    first, _, ink = layers(replace(scene, style="inked"))
    second = layers(replace(scene, style="striped"))[1]
    stack = np.stack([first + ink, second, ink])
    return stack.reshape(3, SIZE // 2, 2, SIZE // 2, 2).mean((2, 4), dtype=np.float32)


def _object_table(small: torch.Tensor, behind: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error of every object on the given background, best over GRID and shade, and which of GRID that is.

    With p the picture, b the background, o s i the layers and f = o - s - i the first colour's, a rendering is
    b (1 - o) + i ink + shade (f colour + s second). So |p - rendering|^2 = |q|^2 - 2 shade <q, x> + shade^2 <x, x>
    for q = p - b (1 - o) - i ink and x = f colour + s second: inner products of p with the bank are all it takes.
    Both results [N, noun, size, place, colour, style]. b is constant above and below the horizon.
    """
    rows, products = _bank()
    rest = small - behind
    planes = torch.cat([rest, (rest * behind).sum(1, keepdim=True)], 1)
    dots = (planes.flatten(0, 1) @ rows.flatten(0, 1).T).reshape(len(small), 4, 3, -1)
    halves = behind[:, :, [0, -1]]
    over = {pair: halves @ product for pair, product in products.items()}  # <a b, b> [N, 3, G]
    plain = {pair: product.sum(0) for pair, product in products.items()}  # <a, b> [G]
    uncovered = rest.square().sum((1, 2))[:, None] + 2 * dots[:, 3, 0] + halves.square().sum(1) @ products["oo"]
    colours = torch.tensor(list(COLOURS.values()))
    errors, jitters = [], []
    for look in STYLES.values():
        s, i = float(look.pattern != "plain"), float(look.ink_width > 0)  # no named style has both
        second, ink = torch.tensor(look.second), torch.tensor(look.ink)
        q_first = dots[:, :3, 0] + over["oo"] - s * (dots[:, :3, 1] + over["os"]) - i * (dots[:, :3, 2] + over["oi"])
        q_first -= i * ink[:, None] * (plain["oi"] - plain["ii"])
        q_second = s * torch.einsum("ncg,c->ng", dots[:, :3, 1] + over["os"], second)
        qq = uncovered + i * (ink.square().sum() * plain["ii"])
        qq -= 2 * i * torch.einsum("ncg,c->ng", dots[:, :3, 2] + over["oi"], ink)
        qx = torch.einsum("ncg,kc->ngk", q_first, colours) + q_second[..., None]
        ff = plain["oo"] - s * (2 * plain["os"] - plain["ss"]) - i * (2 * plain["oi"] - plain["ii"])
        xx = ff[:, None] * colours.square().sum(1) + s * plain["ss"][:, None] * second.square().sum()
        xx += 2 * s * (plain["os"] - plain["ss"])[:, None] * (colours @ second)
        shade = (qx / xx.clamp_min(1e-6)).clamp(LOWEST[4], HIGHEST[4])
        error = qq[..., None] + shade * (shade * xx - 2 * qx)
        best = error.clamp_min(0).unflatten(1, (-1, len(GRID))).min(2)
        errors.append(best.values)
        jitters.append(best.indices)
    shape = (len(OUTLINES), len(SIZES), len(PLACES))
    return torch.stack(errors, -1).unflatten(1, shape), torch.stack(jitters, -1).unflatten(1, shape)


def _candidates(
    errors: torch.Tensor, jitters: torch.Tensor, stated: Stated, background: str, shade_behind: float
) -> list[Scene]:
    """The scenes of a picture's table that agree with the statement and come nearest, at most CANDIDATES.

    Those with twice the least squared error are left out (on 300 pictures the true scene never had more than 1.2 times
    the least under a blur of 1.2 pixels, and was always first without).
    """
    allowed = torch.zeros_like(errors, dtype=torch.bool)
    allowed[np.ix_(*([VALUES[a].index(v) for v in _allowed(a, stated)] for a in OBJECT_AXES))] = True
    best = errors.masked_fill(~allowed, torch.inf).flatten().topk(CANDIDATES, largest=False)
    scenes = []
    for flat in best.indices[best.values <= 2 * best.values[0]].tolist():
        cell = np.unravel_index(flat, errors.shape)
        named = {axis: VALUES[axis][k] for axis, k in zip(OBJECT_AXES, cell, strict=True)}
        jitter = replace(GRID[int(jitters[cell])], shade_behind=shade_behind)
        scenes.append(Scene(**named, background=background, jitter=jitter))
    return scenes


def _nearest(picture: np.ndarray, scenes: Sequence[Scene]) -> Reading:
    """The candidate that comes nearest to the picture [64, 64, 3] in [0, 1] after its jitter is refined."""
    found = []
    for rough in scenes:
        scene, _ = _refined(picture, rough, 0.0, steps=2)
        drawn = render(scene) / np.float32(255)
        blur = min(BLURS, key=lambda sigma: _rmse(picture, _blurred(drawn, sigma)))
        found.append((*_refined(picture, scene, blur, steps=6), blur))
    scene, error, blur = min(found, key=lambda candidate: candidate[1])
    if not blur and ALIKE < error < UNLIKE:
        scene = _polished(picture, scene, error)
    return Reading(scene, _rmse(picture, render(scene) / np.float32(255)), blur)


def _refined(picture: np.ndarray, scene: Scene, blur: float, steps: int) -> tuple[Scene, float]:
    """The scene with its jitter fitted by Gauss-Newton steps, and its RMSE. A step that does not help is shortened."""
    cover, drawn = _drawn(scene, blur)
    error = _rmse(picture, drawn)
    for _ in range(steps):
        slopes = _slopes(scene, cover, blur)
        normal = slopes @ slopes.T
        normal += np.diag(0.01 * np.diag(normal) + 1e-6)
        step = np.linalg.solve(normal, slopes @ (picture - drawn).ravel())
        before = error
        for share in (1.0, 0.5, 0.2):
            values = np.clip(np.array(astuple(scene.jitter)) + share * step, LOWEST, HIGHEST)
            trial = replace(scene, jitter=Jitter(*map(float, values)))
            trial_cover, trial_drawn = _drawn(trial, blur)
            trial_error = _rmse(picture, trial_drawn)
            if trial_error < error:
                scene, cover, drawn, error = trial, trial_cover, trial_drawn, trial_error
                break
        if error > 0.98 * before:
            break
    return scene, error


def _polished(picture: np.ndarray, scene: Scene, error: float) -> Scene:
    """The scene after coordinate descent on offset, scale and turn: outlines are drawn on whole subpixels, so that a
    sharp picture has hollows that slopes do not see."""
    for share in (1.0, 0.4):
        for step in (*np.diag(POLISH[:4]), *-np.diag(POLISH[:4])):
            values = np.array(astuple(scene.jitter))
            values[:4] += share * step
            trial = replace(scene, jitter=Jitter(*map(float, np.clip(values, LOWEST, HIGHEST))))
            trial_error = _rmse(picture, _drawn(trial, 0.0)[1])
            if trial_error < error:
                scene, error = trial, trial_error
    return scene


def _paints(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Shaded colours of the three layers, [3, 3], and the shaded background, [4096, 3]; float32."""
    look, jitter = STYLES[scene.style], scene.jitter
    front = np.array((COLOURS[scene.colour], look.second, look.ink), dtype=np.float32)
    front[:2] *= jitter.shade
    return front, (backdrop(scene.background) * jitter.shade_behind).astype(np.float32).reshape(-1, 3)


def _drawn(scene: Scene, blur: float) -> tuple[np.ndarray, np.ndarray]:
    """The scene's coverage layers [3, 4096], and its float32 drawing [64, 64, 3] under the blur."""
    cover = np.stack(layers(scene)).reshape(3, -1)
    front, behind = _paints(scene)
    drawn = behind * (1 - cover.sum(0))[:, None] + cover.T @ front
    return cover, _blurred(np.clip(drawn, 0, 1).reshape(SIZE, SIZE, 3), blur)


def _slopes(scene: Scene, cover: np.ndarray, blur: float) -> np.ndarray:
    """Derivatives of the blurred drawing along the six jitters, [6, 12288], the layers taken as moving rigidly."""
    front, behind = _paints(scene)
    jitter = scene.jitter
    down: np.ndarray = np.gradient(cover.reshape(3, SIZE, SIZE), axis=1)
    right: np.ndarray = np.gradient(cover.reshape(3, SIZE, SIZE), axis=2)
    centre_x, centre_y = PLACES[scene.place]
    x = PIXELS - np.float32(centre_x + jitter.dx)
    y = (PIXELS - np.float32(centre_y + jitter.dy))[:, None]
    moves = np.stack([-right, -down, -(x * right + y * down) / np.float32(jitter.scale), y * right - x * down])
    slopes = np.empty((6, SIZE * SIZE, 3), dtype=np.float32)
    moves = moves.reshape(4, 3, -1)
    slopes[:4] = moves.transpose(0, 2, 1) @ front - behind * moves.sum(1)[..., None]
    slopes[4] = cover[:2].T @ front[:2] / np.float32(jitter.shade)
    slopes[5] = behind * ((1 - cover.sum(0)) / np.float32(jitter.shade_behind))[:, None]
    return _blurred(slopes.reshape(6, SIZE, SIZE, 3), blur).reshape(6, -1)


# --- pixels


def _rmse(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(np.square(one - other).mean()))


@functools.cache
def _blur_matrix(sigma: float) -> np.ndarray:
    """A Gaussian over one side of the picture as float32 [64, 64]; the border repeats."""
    taps = np.arange(-8, 9)
    weights = np.exp(-0.5 * (taps / sigma) ** 2)
    matrix = np.zeros((SIZE, SIZE), dtype=np.float32)
    for tap, weight in zip(taps, weights / weights.sum(), strict=True):
        np.add.at(matrix, (np.arange(SIZE), np.clip(np.arange(SIZE) + tap, 0, SIZE - 1)), weight)
    return matrix


def _blurred(pictures: np.ndarray, sigma: float) -> np.ndarray:
    """Pictures [..., 64, 64, 3] under a Gaussian of sigma pixels."""
    if not sigma:
        return pictures
    matrix = _blur_matrix(sigma)
    rows_done = (matrix @ pictures.reshape(*pictures.shape[:-2], -1)).reshape(pictures.shape)
    return matrix @ rows_done


def _grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    """A bool mask [64, 64] grown by `pixels` in every direction, corners included."""
    padded = np.pad(mask, pixels)
    side = 2 * pixels + 1
    return np.lib.stride_tricks.sliding_window_view(padded, (side, side)).any((2, 3))


def _gradient(picture: np.ndarray) -> np.ndarray:
    """Norm over x, y and RGB of central differences, [64, 64]."""
    down, right = np.gradient(picture, axis=(0, 1))
    return np.sqrt((np.square(down) + np.square(right)).sum(2))


def _crispness(picture: np.ndarray, rendering: np.ndarray) -> tuple[float, float]:
    """(sharpness, speckle) of a picture beside a rendering, both uint8 [64, 64, 3]."""
    ours, ideal = _gradient(picture / 255.0), _gradient(rendering / 255.0)
    near = _grown(ideal > 0.25 * ideal.max(), 2)
    sharp = min(1.0, float(np.percentile(ours[near], 95) / np.percentile(ideal[near], 95)))
    grey = picture.mean(2) / 255.0
    laplacian = grey[2:, 1:-1] + grey[:-2, 1:-1] + grey[1:-1, 2:] + grey[1:-1, :-2] - 4 * grey[1:-1, 1:-1]
    flat = ~_grown(ideal > 0.02, 3)
    flat[[0, 1, -2, -1]] = flat[:, [0, 1, -2, -1]] = False
    return sharp, float(np.abs(laplacian)[flat[1:-1, 1:-1]].mean())


def _objects_mask(scenes: Sequence[Scene]) -> np.ndarray:
    """Pixels that the object of any of the scenes touches, grown by 2 pixels, bool [64, 64]."""
    return _grown(np.any([np.sum(layers(scene), axis=0) > 0 for scene in scenes], axis=0), 2)


def _shifted_errors(picture: np.ndarray, renderings: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """RMSE inside the mask of a picture to renderings [R, 64, 64, 3], least over shifts up to 2 pixels, [R]."""
    padded = np.pad(picture / 255.0, ((2, 2), (2, 2), (0, 0)), mode="edge")
    shifted = [padded[dy : dy + SIZE, dx : dx + SIZE][mask].ravel() for dy in range(5) for dx in range(5)]
    ideals = (renderings[:, mask] / 255.0).reshape(len(renderings), -1)
    moved = np.stack(shifted)
    squared = np.square(moved).sum(1)[:, None] - 2 * moved @ ideals.T + np.square(ideals).sum(1)
    return np.sqrt(np.maximum(squared.min(0), 0) / ideals.shape[1])
