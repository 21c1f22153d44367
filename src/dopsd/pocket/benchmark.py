"""The concept benchmark: what a model learned from images of a new thing or in a new style, and
what it forgot.

Learning is measured on unseen scenes of the concept, forgetting on unrelated prompts, both from
pixels and on fixed noise.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from diffusers import ZImageTransformer2DModel
from PIL import Image
from torch import Tensor

from dopsd.diffusion.batch import Context
from dopsd.diffusion.components import VAE, TextEncoder
from dopsd.diffusion.flow import Schedule
from dopsd.diffusion.rollout import Velocity
from dopsd.diffusion.sampling import generate, noise_for
from dopsd.evaluation.benchmarks import SHOWN, BenchmarkResult, Kind
from dopsd.files import sha256_of
from dopsd.models.pipeline import ImagePipeline
from dopsd.models.zimage import ZImageDenoiser
from dopsd.pocket.build.architecture import GUIDANCE
from dopsd.pocket.metrics.reader import measure, thing_error, thing_hit, thing_sharp
from dopsd.pocket.world.captions import NAMES, caption_of, stated_of
from dopsd.pocket.world.datasets import (
    HELD_OUT,
    Concept,
    concept_of,
    write_concept,
    write_style_concept,
)
from dopsd.pocket.world.scenes import Jitter, Scene, draw_scene, render

UNSEEN_SCENES, UNRELATED = 24, 96  # prompts of each kind
NOISE_SEED = 50_000
DISTRACTORS = tuple(range(2 * HELD_OUT, 2 * HELD_OUT + 63))  # seeds of thing_hit's other things
OF_THE_THING = ("thing_error", "thing_hit", "thing_sharp")  # teachers have these alone
METRICS = (*OF_THE_THING, "bleed", "sharpness", "speckle", "attributes")
MEASURED = (*OF_THE_THING, "sharpness", "speckle", "attributes", "others_error")
TeacherSees = Literal["target", "another"]
"""The image in the teacher's context: the true image of the scene that is generated, as in D-OPSD's
training, or an image of the data set, which shows the thing in another scene."""
DEFINITIONS = {
    "thing_error": "root mean square difference to the true image within the thing (0 to 1), in "
    "24 unseen scenes; lower is better",
    "thing_hit": "share of those images that are nearer to the thing than to every one of some "
    "other things; higher is better",
    "thing_sharp": "strength of edges in those images, over that of the true image (0 to 1); "
    "higher is better",
    "bleed": "by how much thing_error falls, compared with the base model, where the prompt gives "
    "another name or none; lower is better",
    "sharpness": "strength of edges, over that of a clean drawing of the same scene (0 to 1), on "
    "96 unrelated prompts; higher is better",
    "speckle": "mean absolute Laplacian where that drawing is flat; lower is better",
    "attributes": "share of the attributes in those prompts that the image shows; higher is better",
    "teacher": "the base model with the true image in its context: what D-OPSD learns from",
    "teacher, another image": "the base model with one of the training images in its context",
}


@dataclass(frozen=True)
class ConceptQuestions:
    """The benchmark's prompts for one concept, encoded: the same for every model.

    scenes: the true scenes. teacher_contexts: their prompts with each image that a teacher may see,
    empty where no data set was given. renamed: the scenes' captions with another made-up name, or
    none. stated: what each unrelated prompt states.
    """

    scenes: tuple[Scene, ...]
    scene_context: Context
    teacher_contexts: Mapping[TeacherSees, Context]
    renamed: tuple[str, ...]
    renamed_context: Context
    stated: tuple[Mapping[str, str], ...]
    unrelated_context: Context

    @staticmethod
    def encode(
        seed: int,
        text_encoder: TextEncoder,
        data: Path | None = None,
        unrelated_count: int = UNRELATED,
        kind: Literal["thing", "style"] = "thing",
        stream: int | None = None,
    ) -> "ConceptQuestions":
        """The questions for thing (or style) `seed`. data: its images, for the teachers' contexts;
        the text encoder then needs its VLM. stream: see `unrelated_statements`; default: the same
        unrelated prompts for every concept."""
        concept = Concept(kind, seed)
        rng = np.random.default_rng([HELD_OUT, seed, 2 if kind == "thing" else 6])
        drawn = concept.draw_scenes(rng, UNSEEN_SCENES)
        scenes = tuple(replace(scene, jitter=Jitter()) for scene in drawn)
        prompts = [concept.caption(scene, concept.name) for scene in scenes]
        teacher_contexts: dict[TeacherSees, Context] = {}
        if data is not None:
            files = sorted(data.glob("*.png"))
            another = [Image.open(files[i % len(files)]).convert("RGB") for i in range(len(scenes))]
            target = [Image.fromarray(render(scene)) for scene in scenes]
            teacher_contexts["target"] = text_encoder.context(prompts, target)
            teacher_contexts["another"] = text_encoder.context(prompts, another)
        stated = unrelated_statements(unrelated_count, 3 if stream is None else stream)
        renamed = tuple(renamed_caption(concept, scene, k) for k, scene in enumerate(scenes))
        return ConceptQuestions(
            scenes,
            text_encoder.context(prompts),
            teacher_contexts,
            renamed,
            text_encoder.context(list(renamed)),
            stated,
            text_encoder.context([caption_of(each) for each in stated]),
        )


def renamed_caption(concept: Concept, scene: Scene, index: int) -> str:
    """The caption of a concept's scene with a name that is not its own at even indices, cycling
    through all others, and without a name at odd ones."""
    other = (concept.seed + 1 + index // 2 % (len(NAMES) - 1)) % len(NAMES)
    return concept.caption(scene, NAMES[other] if index % 2 == 0 else None)


def unrelated_statements(count: int, stream: int = 3) -> tuple[dict[str, str], ...]:
    """What the captions of `count` held-out named scenes state, attributes left out as in
    training."""
    rng = np.random.default_rng([HELD_OUT, stream])
    return tuple(stated_of(draw_scene(rng), rng) for _ in range(count))


@dataclass(frozen=True)
class ConceptResult:
    """The generated images, uint8 [N, 64, 64, 3], and each metric image by image.

    attributes: share of the stated attributes that an image shows. others_error: thing_error of the
    renamed scenes; it is bleed where it is lower than the base model's.
    """

    thing_images: Tensor
    unrelated_images: Tensor
    renamed_images: Tensor
    thing_error: np.ndarray
    thing_hit: np.ndarray
    thing_sharp: np.ndarray
    sharpness: np.ndarray
    speckle: np.ndarray
    attributes: np.ndarray
    others_error: np.ndarray

    def means(self) -> dict[str, float | None]:
        """The mean of each metric; None where nothing was measured."""
        values = {name: getattr(self, name) for name in MEASURED}
        return {
            name: float(np.nanmean(each)) if len(each) else None for name, each in values.items()
        }


def evaluate_concept(
    questions: ConceptQuestions,
    velocity: Velocity,
    vae: VAE,
    schedule: Schedule,
    latent_shape: tuple[int, int, int],
    teacher_sees: TeacherSees | None = None,
    noise_seed: int = NOISE_SEED,
) -> ConceptResult:
    """Generate and measure. latent_shape: (channels, height, width). teacher_sees: generate the
    scenes alone, with this image in the context. Another noise_seed gives the noise floor."""
    context = questions.scene_context
    if teacher_sees:
        assert questions.teacher_contexts, (
            "the questions were encoded without the data set's images"
        )
        context = questions.teacher_contexts[teacher_sees]
    count, nothing = len(questions.scenes), np.zeros(0)
    seeds = range(noise_seed, noise_seed + count + len(questions.stated))
    noise = noise_for(seeds, *latent_shape)
    things = generate(velocity, vae, schedule, context, noise[:count])
    unrelated = renamed = things[:0]
    sharpness = speckle = attributes = others_error = nothing
    if not teacher_sees:
        unrelated = generate(velocity, vae, schedule, questions.unrelated_context, noise[count:])
        renamed = generate(velocity, vae, schedule, questions.renamed_context, noise[:count])
        measures = measure(unrelated.numpy(), questions.stated)
        sharpness, speckle = measures.sharpness, measures.speckle
        attributes = measures.attributes.per_image
        others_error = thing_error(renamed.numpy(), questions.scenes)
    return ConceptResult(
        things,
        unrelated,
        renamed,
        thing_error(things.numpy(), questions.scenes),
        thing_hit(things.numpy(), questions.scenes, DISTRACTORS).astype(float),
        thing_sharp(things.numpy(), questions.scenes),
        sharpness,
        speckle,
        attributes,
        others_error,
    )


def render_scenes(scenes: Sequence[Scene]) -> Tensor:
    """The true images of scenes, uint8 [N, 64, 64, 3]."""
    return torch.from_numpy(np.stack([render(scene) for scene in scenes]))


class ManyStepModel:
    """The model that pocket was distilled from: many steps, with classifier-free guidance."""

    def __init__(self, checkpoint: Path, unconditional: Context, device: torch.device):
        """checkpoint: a folder with the many-step transformer in `parent`. unconditional: the empty
        caption, on the device."""
        network = ZImageTransformer2DModel.from_pretrained(
            checkpoint / "parent", subfolder="transformer", torch_dtype=torch.float32
        )
        self.denoiser, self.unconditional = ZImageDenoiser(network).to(device), unconditional

    def __call__(self, z: Tensor, t: Tensor, context: Context) -> Tensor:
        unconditional = Context.stack([self.unconditional] * len(z))
        return torch.lerp(
            self.denoiser(z, t, unconditional), self.denoiser(z, t, context), GUIDANCE
        )


class ConceptBenchmark:
    """The benchmark of a folder of a concept (see `evaluation.benchmarks.DataBenchmark`)."""

    metrics: tuple[str, ...] = METRICS
    learned: str | None = "thing_error"
    definitions: Mapping[str, str] = MappingProxyType(DEFINITIONS)

    def __init__(self, data: Path, pipeline: ImagePipeline):
        concept = concept_of(data)
        assert concept is not None, f"{data} holds no concept of the pocket world"
        self._pipeline, family = pipeline, pipeline.family
        self.asks_teacher = bool(family.teacher_contexts)
        text_encoder = family.load_text_encoder(
            pipeline.device, pipeline.dtype, images=self.asks_teacher
        )
        self._questions = ConceptQuestions.encode(
            concept.seed, text_encoder, data if self.asks_teacher else None, kind=concept.kind
        )
        files = sorted(data.glob("*.png"))
        self.about: Any = ["concept", *concept, [sha256_of(file) for file in files]]
        self.captions: Mapping[str, tuple[str, ...]] = _captions(self._questions, concept.kind)
        true_images = render_scenes(self._questions.scenes[:SHOWN])
        self.truth: Mapping[str, Sequence[Tensor]] = {next(iter(self.captions)): list(true_images)}
        has_many_step = (family.checkpoint.folder / "parent").is_dir()
        self.many_step: Callable[[], Velocity] | None = (
            self._load_many_step if has_many_step else None
        )

    def _load_many_step(self) -> ManyStepModel:
        family, device = self._pipeline.family, self._pipeline.device
        text_encoder = family.load_text_encoder(device, self._pipeline.dtype, images=False)
        return ManyStepModel(family.checkpoint.folder, text_encoder.context([""]), device)

    def ask(self, velocity: Velocity, nfe: int, kind: Kind) -> BenchmarkResult:
        family = self._pipeline.family
        sees: dict[Kind, TeacherSees] = {"teacher": "target", "teacher_other": "another"}
        side = family.resolution // family.vae_scale_factor
        result = evaluate_concept(
            self._questions,
            velocity,
            self._pipeline.vae,
            family.schedule(nfe, side, side),
            (family.channels, side, side),
            teacher_sees=sees.get(kind),
            noise_seed=HELD_OUT if kind == "floor" else NOISE_SEED,
        )
        values = {name: getattr(result, name) for name in MEASURED}
        images = (result.thing_images, result.renamed_images, result.unrelated_images)
        shown = [list(each[:SHOWN]) for each in images]
        return BenchmarkResult(values, dict(zip(self.captions, shown, strict=True)))

    @staticmethod
    def replicate(data: Path, number: int, target: Path) -> Path:
        """Images of the concept whose seed is `number` higher, as many as `data` has."""
        concept = concept_of(data)
        assert concept is not None, f"{data} holds no concept of the pocket world"
        if number == 0:
            return data
        seed = concept.seed + number
        folder = target / str(seed)
        if not folder.is_dir():
            write = write_concept if concept.kind == "thing" else write_style_concept
            write(folder, seed, images=len(list(data.glob("*.png"))))
        return folder


def _captions(questions: ConceptQuestions, kind: str) -> dict[str, tuple[str, ...]]:
    """Topic -> captions of the images that are shown."""
    scenes, stated = questions.scenes[:SHOWN], questions.stated[:SHOWN]
    return {
        f"The {kind} in new scenes": tuple(
            f"{scene.size}, {scene.place}, {scene.background}" for scene in scenes
        ),
        "The same scenes with another name, or none": questions.renamed[:SHOWN],
        "Unrelated prompts": tuple(
            ", ".join(each.values()) or "(nothing stated)" for each in stated
        ),
    }
