"""What was expected of the claim, written before any of its numbers was measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Expectation:
    """`better` has more of `metric` than `worse`, in a regime: at "the end" of the long run, at
    "equal learning" (the lowest thing_error that both reach), or at "the goal"."""

    words: str
    regime: str
    metric: str
    better: str
    worse: str
    at: str


EXPECTED = (
    Expectation("D-OPSD keeps more sharpness than SFT", "identity", "sharpness", "dopsd", "sft",
                "equal learning"),
    Expectation("D-OPSD keeps more attributes than SFT", "identity", "attributes", "dopsd", "sft",
                "equal learning"),
    Expectation("retention keeps sharpness in SFT", "identity", "sharpness", "sft-retention",
                "sft", "the end"),
    Expectation("retention keeps attributes in SFT", "identity", "attributes", "sft-retention",
                "sft", "the end"),
    Expectation("retention keeps sharpness in D-OPSD", "identity", "sharpness", "dopsd-retention",
                "dopsd", "the end"),
    Expectation("prior preservation keeps less sharpness than retention", "identity", "sharpness",
                "sft-retention", "sft-prior", "the end"),
    Expectation("SFT with retention hits more than D-OPSD with it", "identity", "thing_hit",
                "sft-retention", "dopsd-retention", "the end"),
    Expectation("D-OPSD keeps more sharpness than SFT", "style", "sharpness", "dopsd", "sft",
                "the end"),
    Expectation("D-OPSD keeps more sharpness than SFT", "style", "sharpness", "dopsd", "sft",
                "equal learning"),
    Expectation("retention keeps sharpness in SFT", "style", "sharpness", "sft-retention", "sft",
                "the end"),
)  # fmt: skip
