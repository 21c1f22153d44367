"""The gates the pocket model must pass before any method is tried on it, measured once and then
frozen.

parent at 32 steps: sharpness >= 0.95, attributes >= 0.90     it knows the world
parent at 4 steps:  sharpness <= 0.80                         there is a few-step ability to lose
pocket at 4 steps:  both >= 0.95 of the parent's at 32        the distillation gave that ability
teacher (prompt and image) against student (prompt), on held-out things:
    thing_error lower by >= 5 noise floors, thing_hit >= 3 times the student's
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
from dopsd.pocket import CHECKPOINT as POCKET
from dopsd.pocket.benchmark import HELD_OUT, ManyStepModel, Sheet, sit, unrelated, write_concept
from dopsd.pocket.build.architecture import GUIDANCE
from dopsd.pocket.metrics.reader import measure
from dopsd.pocket.world.captions import caption_of

CAPTIONS, THINGS = 256, 12
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Gate:
    """One line: what was measured with its 95% interval, what it had to be, and whether it is."""

    name: str
    value: float
    low: float
    high: float
    wanted: str
    passed: bool


def measure_gates(checkpoint: Path = POCKET, work: Path | None = None) -> list[Gate]:
    """Measure every gate (about 4 minutes on two CPU cores) and leave them in
    `<checkpoint>/gates.json`."""
    family = load_family(str(checkpoint))
    text_encoder = family.load_text_encoder(CPU, torch.float32, images=True)
    vae = family.load_vae(CPU, torch.float32)
    pocket = family.load_denoiser(CPU, torch.float32)
    parent = ManyStepModel(checkpoint, text_encoder.context([""]))
    side = family.resolution // family.vae_scale_factor
    latent_shape = (family.channels, side, side)
    stated = unrelated(CAPTIONS, stream=4)
    context = text_encoder.context([caption_of(s) for s in stated])
    noise = noise_for(range(CAPTIONS), *latent_shape)

    def kept(model: Velocity, nfe: int) -> tuple[np.ndarray, np.ndarray]:
        images = generate(model, vae, family.schedule(nfe, side, side), context, noise)
        found = measure(images.numpy(), stated)
        return found.sharpness, found.attributes.per_image

    sharp32, right32 = kept(parent, 32)
    sharp4, _ = kept(parent, 4)
    sharp, right = kept(pocket, family.default_nfe)
    gates = [
        _gate("parent, NFE 32: sharpness", sharp32, 0.95, above=True),
        _gate("parent, NFE 32: attributes", right32, 0.90, above=True),
        _gate("parent, NFE 4: sharpness", sharp4, 0.80, above=False),
        _gate("pocket, NFE 4: sharpness", sharp, 0.95 * float(np.nanmean(sharp32)), above=True),
        _gate("pocket, NFE 4: attributes", right, 0.95 * float(np.nanmean(right32)), above=True),
    ]
    student, again, teacher = [], [], []
    schedule = family.schedule(family.default_nfe, side, side)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        for thing in range(HELD_OUT, HELD_OUT + THINGS):
            concept = Path(folder) / str(thing)
            write_concept(concept, thing)
            sheet = Sheet.write(thing, text_encoder, concept, unrelated_count=1)
            student.append(sit(sheet, pocket, vae, schedule, latent_shape))
            again.append(sit(sheet, pocket, vae, schedule, latent_shape, noise_seed=HELD_OUT))
            teacher.append(sit(sheet, pocket, vae, schedule, latent_shape, seeing=True))
    error, error_again, error_seen = (
        np.array([answers.thing_error.mean() for answers in rows])
        for rows in (student, again, teacher)
    )
    floor = float(np.abs(error - error_again).mean() / np.sqrt(THINGS))
    hit, hit_seen = (
        float(np.mean([answers.thing_hit.mean() for answers in rows]))
        for rows in (student, teacher)
    )
    gates.append(
        _gate(
            "teacher nearer to the thing than the student, in thing_error",
            error - error_seen,
            5 * floor,
            True,
        )
    )
    gates.append(
        _gate("teacher's thing_hit", np.array([a.thing_hit.mean() for a in teacher]), 3 * hit, True)
    )
    numbers = {
        "parent_guidance": GUIDANCE,
        "noise_floor_thing_error": floor,
        "student": {"thing_error": float(error.mean()), "thing_hit": hit},
        "teacher": {"thing_error": float(error_seen.mean()), "thing_hit": hit_seen},
        "gates": [asdict(gate) for gate in gates],
    }
    write_json(checkpoint / "gates.json", numbers)
    return gates


def _gate(name: str, values: np.ndarray, bound: float, above: bool) -> Gate:
    mean, low, high = bootstrap(values)
    wanted = f"{'>=' if above else '<='} {bound:.3f}"
    return Gate(name, mean, low, high, wanted, bool(mean >= bound if above else mean <= bound))
