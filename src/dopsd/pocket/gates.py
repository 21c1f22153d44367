"""Requirements on the pocket checkpoint, fixed before any method was tried on it.

many-step model, 32 steps: sharpness >= 0.95, attributes >= 0.90 (it knows the world)
many-step model, 4 steps: sharpness <= 0.80 (there is a few-step ability to lose)
pocket, 4 steps: both >= 0.95 of the many-step model's at 32 (distillation gave that ability)
teacher (prompt and image) against student (prompt), on held-out things: thing_error lower by at
    least 5 noise floors, thing_hit at least 3 times the student's
"""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from dopsd.diffusion.rollout import Velocity
from dopsd.diffusion.sampling import generate, noise_for
from dopsd.evaluation.statistics import bootstrap
from dopsd.files import write_json
from dopsd.models import load_family
from dopsd.pocket import CHECKPOINT
from dopsd.pocket.benchmark import (
    ConceptQuestions,
    ConceptResult,
    ManyStepModel,
    evaluate_concept,
    unrelated_statements,
)
from dopsd.pocket.build.architecture import GUIDANCE
from dopsd.pocket.metrics.reader import measure
from dopsd.pocket.world.captions import caption_of
from dopsd.pocket.world.datasets import HELD_OUT, write_concept

CAPTIONS, THINGS = 256, 12
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Gate:
    """A requirement: the measured value with its 95% interval, and what it has to be."""

    name: str
    value: float
    low: float
    high: float
    wanted: str
    passed: bool


def measure_gates(checkpoint: Path = CHECKPOINT, work: Path | None = None) -> list[Gate]:
    """Measure every gate and write `<checkpoint>/gates.json`; about 4 minutes on two CPU cores.
    work: where temporary files go."""
    family = load_family(str(checkpoint))
    text_encoder = family.load_text_encoder(CPU, torch.float32, images=True)
    vae = family.load_vae(CPU, torch.float32)
    pocket = family.load_denoiser(CPU, torch.float32)
    many_step = ManyStepModel(checkpoint, text_encoder.context([""]), CPU)
    side = family.resolution // family.vae_scale_factor
    latent_shape = (family.channels, side, side)

    # Image quality on unrelated prompts: (sharpness, attributes), each [CAPTIONS].
    stated = unrelated_statements(CAPTIONS, stream=4)
    context = text_encoder.context([caption_of(each) for each in stated])
    noise = noise_for(range(CAPTIONS), *latent_shape)

    def quality(model: Velocity, nfe: int) -> tuple[np.ndarray, np.ndarray]:
        images = generate(model, vae, family.schedule(nfe, side, side), context, noise)
        measures = measure(images.numpy(), stated)
        return measures.sharpness, measures.attributes.per_image

    sharp32, right32 = quality(many_step, 32)
    sharp4, _ = quality(many_step, 4)
    sharp, right = quality(pocket, family.default_nfe)
    gates = [
        _at_least("many-step model, NFE 32: sharpness", sharp32, 0.95),
        _at_least("many-step model, NFE 32: attributes", right32, 0.90),
        _at_most("many-step model, NFE 4: sharpness", sharp4, 0.80),
        _at_least("pocket, NFE 4: sharpness", sharp, 0.95 * float(np.nanmean(sharp32))),
        _at_least("pocket, NFE 4: attributes", right, 0.95 * float(np.nanmean(right32))),
    ]

    # The teacher's lead on held-out things.
    student: list[ConceptResult] = []
    other_noise: list[ConceptResult] = []
    teacher: list[ConceptResult] = []
    schedule = family.schedule(family.default_nfe, side, side)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        for thing in range(HELD_OUT, HELD_OUT + THINGS):
            concept = Path(folder) / str(thing)
            write_concept(concept, thing)
            questions = ConceptQuestions.encode(thing, text_encoder, concept, unrelated_count=1)
            asked = (questions, pocket, vae, schedule, latent_shape)
            student.append(evaluate_concept(*asked))
            other_noise.append(evaluate_concept(*asked, noise_seed=HELD_OUT))
            teacher.append(evaluate_concept(*asked, teacher_sees="another"))
    error, floor_error, teacher_error = (
        np.array([result.thing_error.mean() for result in results])
        for results in (student, other_noise, teacher)
    )
    student_hit, teacher_hit = (
        np.array([result.thing_hit.mean() for result in results]) for results in (student, teacher)
    )
    floor = float(np.abs(error - floor_error).mean() / np.sqrt(THINGS))
    lead = "teacher nearer to the thing than the student, in thing_error"
    gates.append(_at_least(lead, error - teacher_error, 5 * floor))
    gates.append(_at_least("teacher's thing_hit", teacher_hit, 3 * float(student_hit.mean())))

    # Write them.
    numbers = {
        "many_step_guidance": GUIDANCE,
        "noise_floor_thing_error": floor,
        "student": {"thing_error": float(error.mean()), "thing_hit": float(student_hit.mean())},
        "teacher": {
            "thing_error": float(teacher_error.mean()),
            "thing_hit": float(teacher_hit.mean()),
        },
        "gates": [asdict(gate) for gate in gates],
    }
    write_json(checkpoint / "gates.json", numbers)
    return gates


def _at_least(name: str, values: np.ndarray, bound: float) -> Gate:
    mean, low, high = bootstrap(values)
    return Gate(name, mean, low, high, f">= {bound:.3f}", bool(mean >= bound))


def _at_most(name: str, values: np.ndarray, bound: float) -> Gate:
    mean, low, high = bootstrap(values)
    return Gate(name, mean, low, high, f"<= {bound:.3f}", bool(mean <= bound))
