"""What the claim is measured with: arms, each the sections of a recipe, and regimes of data.

A further arm is a row of MAIN or VARIANTS. The rule that picks the default is in claim_verdict.py,
what was expected in claim_expected.py.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from dopsd.pocket.benchmark import unrelated_statements
from dopsd.pocket.world.captions import caption_of
from dopsd.pocket.world.datasets import HELD_OUT

RATES = (3e-4, 1e-3, 3e-3)
UNRELATED = 48  # prompts that measure what is kept, others for each concept
SWEEP_THINGS = (HELD_OUT + 500, HELD_OUT + 501)
SWEEP_FORWARDS = (480, 1_200, 2_400, 4_800)  # of the network, before looks; see Regime.forwards


@dataclass(frozen=True)
class Regime:
    """Concepts of one kind. images: of each. forwards: of the network, after which the looks are;
    the last of them end the long run. seeds: of training, in the order they are measured."""

    kind: str
    concepts: tuple[int, ...]
    images: int
    forwards: tuple[int, ...]
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Arm:
    """A way to train. rate_of: the arm whose learning rate it takes; None: swept for itself.
    first_step: no look is before (D-OPSD passes a trough of sharpness near step 15)."""

    title: str
    sections: dict[str, dict[str, Any]]
    rate_of: str | None = None
    first_step: int = 1

    @property
    def mark(self) -> str:
        """Stands for the sections in what was measured with them."""
        text = json.dumps(self.sections, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


REGIMES = {
    "identity": Regime(
        "thing",
        tuple(range(HELD_OUT + 200, HELD_OUT + 205)),
        images=4,
        forwards=(480, 1_200, 2_400, 4_800, 9_600),
        seeds=(0, 1, 2),
    ),
    "style": Regime(
        "style",
        tuple(range(HELD_OUT + 300, HELD_OUT + 303)),
        images=32,
        forwards=(2_400, 4_800, 9_600, 19_200),
    ),
}


def prompts_of(kind: str) -> list[str]:
    """Prompts to replay, none of which measures anything.

    alike: 48 captions like those that measure. unlike: 48 that state neither place nor background.
    four: the first of `alike`.
    """
    measured = {
        caption_of(stated)
        for concept in (*SWEEP_THINGS, *(c for each in REGIMES.values() for c in each.concepts))
        for stated in unrelated_statements(UNRELATED, concept)
    }
    drawn = [stated for stated in unrelated_statements(800, stream=9)]
    if kind == "unlike":
        drawn = [each for each in drawn if not {"place", "background"} & each.keys()]
    captions = dict.fromkeys(caption_of(stated) for stated in drawn)
    count = 4 if kind == "four" else 48
    return [caption for caption in captions if caption not in measured][:count]


def sft(title: str, rate_of: str | None = None, **retention: Any) -> Arm:
    """SFT with these settings of retention."""
    held = {"retention": retention} if retention else {}
    return Arm(title, {"method": {"name": "sft"}} | held, rate_of)


def dopsd(title: str, weight: float = 0.0, rate_of: str | None = None, **method: Any) -> Arm:
    """D-OPSD with these settings of its own and a weight of retention."""
    held = {"retention": {"weight": weight}} if weight else {}
    return Arm(title, {"method": {"name": "dopsd"} | method} | held, rate_of, first_step=80)


MAIN = {
    "sft": sft("SFT"),
    "sft-retention": sft("SFT + retention", weight=1.0),
    "dopsd": dopsd("D-OPSD"),
    "dopsd-retention": dopsd("D-OPSD + retention", weight=1.0),
    "sft-prior": sft("SFT + prior preservation", weight=1.0, target="data"),
    "pso": Arm("PSO", {"method": {"name": "pso"}}),
}
IN_STYLES = ("sft", "sft-retention", "dopsd", "dopsd-retention")
VARIANTS = {
    # Retention: where the student is held, on which prompts, how strongly
    "retention-walk": sft(
        "SFT + retention, states: walk", "sft-retention", weight=1.0, states="walk"
    ),
    "retention-step": sft(
        "SFT + retention, states: step", "sft-retention", weight=1.0, states="step"
    ),
    "retention-alike": sft(
        "SFT + retention, prompts like the measured ones",
        "sft-retention",
        weight=1.0,
        prompts=prompts_of("alike"),
    ),
    "retention-unlike": sft(
        "SFT + retention, prompts of another kind",
        "sft-retention",
        weight=1.0,
        prompts=prompts_of("unlike"),
    ),
    "retention-four": sft(
        "SFT + retention, four prompts", "sft-retention", weight=1.0, prompts=prompts_of("four")
    ),
    "retention-0.3": sft("SFT + retention, weight 0.3", "sft-retention", weight=0.3),
    "retention-3": sft("SFT + retention, weight 3", "sft-retention", weight=3.0),
    "dreambooth": Arm(
        "DreamBooth",
        {"method": {"name": "dreambooth", "class_prompt": "a toy", "class_images": 32}},
        rate_of="sft-prior",
    ),
    "dreambooth-base": Arm(
        "DreamBooth, prior_target: base",
        {
            "method": {
                "name": "dreambooth",
                "class_prompt": "a toy",
                "class_images": 32,
                "prior_target": "base",
            }
        },
        rate_of="sft-retention",
    ),
    "pso-retention": Arm(
        "PSO + retention", {"method": {"name": "pso"}, "retention": {"weight": 1.0}}, "pso"
    ),
    # D-OPSD beyond the paper
    "dopsd-frozen": dopsd("D-OPSD, frozen teacher", rate_of="dopsd", teacher_decay=1.0),
    "dopsd-off-policy": dopsd("D-OPSD, states: data", rate_of="dopsd", states="data"),
    "dopsd-one": dopsd("D-OPSD, loss_steps: 1", rate_of="dopsd", loss_steps=1),
    "dopsd-last": dopsd("D-OPSD, loss_steps: last", rate_of="dopsd", loss_steps="last"),
    "dopsd-anchor": dopsd("D-OPSD, anchor: 1", rate_of="dopsd", anchor=1.0),
    "dopsd-split": dopsd("D-OPSD, correction: split", rate_of="dopsd", correction="split"),
}
ARMS = MAIN | VARIANTS
