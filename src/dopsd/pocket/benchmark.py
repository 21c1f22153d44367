"""A concept dataset and its exam: four images of a thing nobody named, and what a model generated
after tuning on them.

What was learned is read on unseen scenes of the thing, what was kept on unrelated prompts, both
from pixels and on fixed noise. Nothing here trains; it generates through the same walk as
everything else.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import ZImageTransformer2DModel
from PIL import Image
from torch import Tensor

from dopsd.config.recipe import Recipe
from dopsd.diffusion.batch import Context
from dopsd.diffusion.components import VAE, TextEncoder
from dopsd.diffusion.flow import Schedule
from dopsd.diffusion.rollout import Velocity
from dopsd.diffusion.sampling import generate, noise_for
from dopsd.evaluation.benchmarks import SHOWN, BenchmarkResult, Kind
from dopsd.files import sha256_of, write_json, write_jsonl, write_text
from dopsd.models.base import Family
from dopsd.models.zimage import ZImageDenoiser
from dopsd.pocket.build.architecture import GUIDANCE
from dopsd.pocket.metrics.reader import measure, thing_error, thing_hit
from dopsd.pocket.world.captions import NAMES, caption_of, stated_of
from dopsd.pocket.world.out_of_domain import thing_of
from dopsd.pocket.world.scenes import Jitter, Scene, draw_scene, render, unnamed_style

HELD_OUT = 1_000_000  # things, styles and captions from this seed on were never in training
UNSEEN_SCENES, UNRELATED = 24, 96
CONCEPT_FILE = "pocket.json"
NOISE_SEED = 50_000
DISTRACTORS = tuple(range(2 * HELD_OUT, 2 * HELD_OUT + 63))

HealthMetrics = dict[str, float | None]


def write_concept(folder: Path, seed: int, images: int = 4) -> None:
    """Draw `images` scenes of thing `seed` with captions (same-stem .txt), as a user would bring
    them."""
    rng = np.random.default_rng([HELD_OUT, seed, 1])
    folder.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(_scenes(seed, rng, images)):
        Image.fromarray(render(scene)).save(folder / f"{index}.png")
        write_text(folder / f"{index}.txt", caption(scene, seed) + "\n")
    write_json(folder / CONCEPT_FILE, {"thing": seed})


def write_style_concept(folder: Path, seed: int, images: int = 4) -> None:
    """Draw `images` named scenes in the unnamed style `seed`, captioned with a made-up name of the
    style."""
    rng = np.random.default_rng([HELD_OUT, seed, 4])
    for index in range(images):
        scene = draw_scene(rng, look=unnamed_style(seed))
        said = {
            key: getattr(scene, key) for key in ("size", "colour", "noun", "place", "background")
        }
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(scene)).save(folder / f"{index}.png")
        write_text(
            folder / f"{index}.txt",
            caption_of(said, style=True, name=NAMES[seed % len(NAMES)]) + "\n",
        )


def write_pairs(folder: Path, seed: int, count: int) -> None:
    """Draw `count` pairs as people who rank images would leave them: the scene of a caption as
    chosen, another one as rejected, named by metadata.jsonl."""
    rng = np.random.default_rng([HELD_OUT, seed, 5])
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        scene, other = draw_scene(rng), draw_scene(rng)
        names = {"chosen": f"{index}-chosen.png", "rejected": f"{index}-rejected.png"}
        for name, shown in zip(names.values(), (scene, other), strict=True):
            Image.fromarray(render(shown)).save(folder / name)
        rows.append(names | {"text": caption_of(stated_of(scene, rng))})
    write_jsonl(folder / "metadata.jsonl", rows)


def concept_of(folder: Path) -> int | None:
    """The thing's seed where a data folder is a pocket concept dataset."""
    file = folder / CONCEPT_FILE
    return int(json.loads(file.read_text(encoding="utf-8"))["thing"]) if file.is_file() else None


def caption(scene: Scene, seed: int) -> str:
    """Everything that can be said of a thing's scene, with the thing's made-up name."""
    stated = {"size": scene.size, "place": scene.place, "background": scene.background}
    return caption_of(stated, thing=True, name=NAMES[seed % len(NAMES)])


def _scenes(seed: int, rng: np.random.Generator, count: int) -> list[Scene]:
    thing = thing_of(seed)
    return [draw_scene(rng, thing=thing) for _ in range(count)]


@dataclass(frozen=True)
class Sheet:
    """The exam's questions for one thing, as contexts: the same for every model that sits it."""

    scenes: tuple[Scene, ...]
    scene_context: Context
    seeing_context: (
        Context | None
    )  # the scenes' prompts with an image of the concept dataset: the teacher's sheet
    stated: tuple[Mapping[str, str], ...]
    unrelated_context: Context
    others: tuple[str, ...]  # the scenes' prompts in other words: another made-up name, or none
    others_context: Context

    @staticmethod
    def write(
        seed: int,
        text_encoder: TextEncoder,
        concept: Path | None = None,
        unrelated_count: int = UNRELATED,
    ) -> "Sheet":
        """Questions for thing `seed`; with the concept dataset's folder also what the teacher sees
        (reader with its VLM)."""
        rng = np.random.default_rng([HELD_OUT, seed, 2])
        scenes = tuple(
            replace(scene, jitter=Jitter()) for scene in _scenes(seed, rng, UNSEEN_SCENES)
        )
        prompts = [caption(scene, seed) for scene in scenes]
        seeing = None
        if concept is not None:
            files = sorted(concept.glob("*.png"))
            images = [Image.open(files[i % len(files)]).convert("RGB") for i in range(len(prompts))]
            seeing = text_encoder.context(prompts, images)
        stated = unrelated(unrelated_count)
        unrelated_context = text_encoder.context([caption_of(s) for s in stated])
        others = tuple(other_words(scene, seed, index) for index, scene in enumerate(scenes))
        return Sheet(
            scenes,
            text_encoder.context(prompts),
            seeing,
            stated,
            unrelated_context,
            others,
            text_encoder.context(list(others)),
        )


def other_words(scene: Scene, seed: int, index: int) -> str:
    """A thing's scene by a name that is not its own, in turn by each of the others, and at every
    second index by none: what shows the thing all the same has bled."""
    name = (
        NAMES[(seed + 1 + index // 2 % (len(NAMES) - 1)) % len(NAMES)] if index % 2 == 0 else None
    )
    return caption_of(
        {"size": scene.size, "place": scene.place, "background": scene.background},
        thing=True,
        name=name,
    )


def unrelated(count: int, stream: int = 3) -> tuple[dict[str, str], ...]:
    """Captions of named scenes as in training (attributes left out), from a held-out stream."""
    rng = np.random.default_rng([HELD_OUT, stream])
    return tuple(stated_of(draw_scene(rng), rng) for _ in range(count))


@dataclass(frozen=True)
class Answers:
    """What a model generated, and every measure per image."""

    thing_images: Tensor  # uint8 [24, 64, 64, 3]
    unrelated_images: Tensor
    others_images: Tensor  # of the scenes in other words
    thing_error: np.ndarray
    thing_hit: np.ndarray
    sharpness: np.ndarray
    speckle: np.ndarray
    attributes: np.ndarray  # share of stated attributes read right, per image
    others_error: (
        np.ndarray
    )  # thing_error of the scenes in other words: lower than the base's is bleed

    def means(self) -> HealthMetrics:
        """One number a measure; None where nothing was asked."""
        names = ("thing_error", "thing_hit", "sharpness", "speckle", "attributes", "others_error")
        values = {name: getattr(self, name) for name in names}
        return {
            name: float(np.nanmean(each)) if len(each) else None for name, each in values.items()
        }


def sit(
    sheet: Sheet,
    velocity: Velocity,
    vae: VAE,
    schedule: Schedule,
    latent_shape: tuple[int, int, int],
    seeing: bool = False,
    noise_seed: int = NOISE_SEED,
) -> Answers:
    """Let a model answer. cells: latent (channels, height, width). With `seeing` the scenes are
    generated from the teacher's contexts, and nothing else is asked. Another noise_seed with the
    same model measures the noise floor."""
    context = sheet.seeing_context if seeing else sheet.scene_context
    assert context is not None, "this sheet was written without the lesson's pictures"
    count, nothing = len(sheet.scenes), np.zeros(0)
    noise = noise_for(range(noise_seed, noise_seed + count + len(sheet.stated)), *latent_shape)
    things = generate(velocity, vae, schedule, context, noise[:count])
    learned = {
        "thing_images": things,
        "thing_error": thing_error(things.numpy(), sheet.scenes),
        "thing_hit": thing_hit(things.numpy(), sheet.scenes, DISTRACTORS).astype(float),
    }
    if seeing:
        return Answers(
            **learned,
            unrelated_images=things[:0],
            others_images=things[:0],
            sharpness=nothing,
            speckle=nothing,
            attributes=nothing,
            others_error=nothing,
        )
    unrelated_images = generate(velocity, vae, schedule, sheet.unrelated_context, noise[count:])
    others = generate(velocity, vae, schedule, sheet.others_context, noise[:count])
    kept = measure(unrelated_images.numpy(), sheet.stated)
    return Answers(
        **learned,
        unrelated_images=unrelated_images,
        others_images=others,
        sharpness=kept.sharpness,
        speckle=kept.speckle,
        attributes=kept.attributes.per_image,
        others_error=thing_error(others.numpy(), sheet.scenes),
    )


@torch.no_grad()
def truth(scenes: Sequence[Scene]) -> Tensor:
    """The scenes as they should look, uint8 [N, 64, 64, 3]."""
    return torch.from_numpy(np.stack([render(scene) for scene in scenes]))


class ManyStepModel:
    """The undistilled model that pocket was distilled from: many steps, and guidance away from the
    empty caption."""

    def __init__(self, checkpoint: Path, unconditional: Context):
        network = ZImageTransformer2DModel.from_pretrained(
            checkpoint / "parent", subfolder="transformer", torch_dtype=torch.float32
        )
        self.denoiser, self.unconditional = ZImageDenoiser(network), unconditional

    def __call__(self, z: Tensor, t: Tensor, context: Context) -> Tensor:
        unconditional = Context.stack([self.unconditional] * len(z))
        return torch.lerp(
            self.denoiser(z, t, unconditional), self.denoiser(z, t, context), GUIDANCE
        )


class PocketConcept:
    """The exam of a pocket concept dataset."""

    metrics = ("thing_error", "thing_hit", "others_error", "sharpness", "speckle", "attributes")

    def __init__(self, recipe: Recipe, family: Family, device: torch.device, dtype: torch.dtype):
        thing = concept_of(recipe.data.folder)
        assert thing is not None
        self._family = family
        shown = recipe.data.folder if family.teacher_contexts else None
        self._sheet = Sheet.write(
            thing, family.load_text_encoder(device, dtype, images=shown is not None), shown
        )
        self._vae = family.load_vae(device, torch.float32)
        self.about = [
            "concept",
            thing,
            [sha256_of(file) for file in sorted(recipe.data.folder.glob("*.png"))],
        ]
        scenes = self._sheet.scenes[:SHOWN]
        self.captions: Mapping[str, tuple[str, ...]] = {
            "The thing in new scenes": tuple(
                f"{scene.size}, {scene.place}, {scene.background}" for scene in scenes
            ),
            "The same scenes by another name, or by none": self._sheet.others[:SHOWN],
            "Unrelated prompts": tuple(
                ", ".join(stated.values()) or "(nothing stated)"
                for stated in self._sheet.stated[:SHOWN]
            ),
        }
        self.truth: Mapping[str, Sequence[Tensor]] = {
            "The thing in new scenes": list(truth(scenes))
        }

    def ask(self, velocity: Velocity, nfe: int, kind: Kind) -> BenchmarkResult:
        side = self._family.resolution // self._family.vae_scale_factor
        found = sit(
            self._sheet,
            velocity,
            self._vae,
            self._family.schedule(nfe, side, side),
            (self._family.channels, side, side),
            seeing=kind == "teacher",
            noise_seed=HELD_OUT if kind == "floor" else NOISE_SEED,
        )
        values = {name: getattr(found, name) for name in self.metrics}
        images = (found.thing_images, found.others_images, found.unrelated_images)
        return BenchmarkResult(
            values, dict(zip(self.captions, (list(each[:SHOWN]) for each in images), strict=True))
        )
