"""Requirements on the pocket checkpoint, fixed before it was trained and before any method was
tried on it.

many-step model, 32 steps: sharpness >= 0.95, attributes >= 0.90 (it knows the world)
pocket, 2 steps: sharpness and attributes within 0.03 of what the previous pocket had in 4 steps
many-step model without guidance, 2 steps: at least 0.2 less sharp than pocket (SFT pulls toward its
    flow, so this is the few-step ability that can be lost)
teacher that sees the target, on held-out things: thing_hit >= 0.9, thing_sharp >= 0.75
"""

import tempfile
from collections import defaultdict
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
    OF_THE_THING,
    ConceptQuestions,
    ManyStepModel,
    TeacherSees,
    evaluate_concept,
    unrelated_statements,
)
from dopsd.pocket.build.architecture import GUIDANCE
from dopsd.pocket.metrics.reader import measure
from dopsd.pocket.world.captions import caption_of
from dopsd.pocket.world.datasets import HELD_OUT, write_concept

CAPTIONS, THINGS = 256, 12
# Of the previous packaged weights at 4 steps, by this code on the same captions and noise; they are
# in the history at 2c10a23.
PREVIOUS = {"sharpness": 0.833, "attributes": 0.787}
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
    sharp, right = quality(pocket, family.default_nfe)
    plain_sharp, _ = quality(many_step.denoiser, family.default_nfe)
    nfe = f"NFE {family.default_nfe}"
    gates = [
        _at_least("many-step model, NFE 32: sharpness", sharp32, 0.95),
        _at_least("many-step model, NFE 32: attributes", right32, 0.90),
        _at_least(f"pocket, {nfe}: sharpness", sharp, PREVIOUS["sharpness"] - 0.03),
        _at_least(f"pocket, {nfe}: attributes", right, PREVIOUS["attributes"] - 0.03),
        _at_least(
            f"pocket sharper than the many-step model without guidance, {nfe}",
            sharp - plain_sharp,
            0.2,
        ),
    ]

    # The teacher on held-out things, beside the student and a teacher that sees another scene
    schedule = family.schedule(family.default_nfe, side, side)
    things: dict[str, list[dict[str, float | None]]] = defaultdict(list)
    kinds: dict[str, TeacherSees | None] = {
        "student": None,
        "teacher": "target",
        "teacher_sees_another": "another",
    }
    with tempfile.TemporaryDirectory(dir=work) as folder:
        for thing in range(HELD_OUT, HELD_OUT + THINGS):
            concept = Path(folder) / str(thing)
            write_concept(concept, thing)
            questions = ConceptQuestions.encode(thing, text_encoder, concept, unrelated_count=1)
            for name, sees in kinds.items():
                result = evaluate_concept(
                    questions, pocket, vae, schedule, latent_shape, teacher_sees=sees
                )
                things[name].append(result.means())
    table = {
        name: {metric: np.array([row[metric] for row in rows]) for metric in OF_THE_THING}
        for name, rows in things.items()
    }
    gates.append(_at_least("teacher's thing_hit", table["teacher"]["thing_hit"], 0.9))
    gates.append(_at_least("teacher's thing_sharp", table["teacher"]["thing_sharp"], 0.75))

    # Write them.
    numbers = {
        "many_step_guidance": GUIDANCE,
        **{
            name: {metric: float(values.mean()) for metric, values in row.items()}
            for name, row in table.items()
        },
        "gates": [asdict(gate) for gate in gates],
    }
    write_json(checkpoint / "gates.json", numbers)
    return gates


def _at_least(name: str, values: np.ndarray, bound: float) -> Gate:
    mean, low, high = bootstrap(values)
    return Gate(name, mean, low, high, f">= {bound:.3f}", bool(mean >= bound))
