"""How often 95% intervals hold the truth, by simulated experiments: `python benchmarks/coverage.py`
(about 3 minutes).

Prompts and seeds are normal. "prompts": dopsd.evaluation.statistics.bootstrap, which resamples
prompts with all their seeds and widens the percentiles. "plain": the same without widening. "both":
plain, resampling seeds within drawn prompts too.
"""

import numpy as np
import typer

from dopsd.evaluation.statistics import DRAWS, bootstrap

EXPERIMENTS, SEEDS = 2000, 4


def coverage(prompts: int, between: float, within: float) -> list[float]:
    """Of the three ways. between, within: standard deviations of prompts and of their seeds."""
    rng = np.random.default_rng([prompts, 7])
    hits = np.zeros(3)
    for _ in range(EXPERIMENTS):
        table = between * rng.normal(size=(prompts, 1)) + within * rng.normal(size=(prompts, SEEDS))
        drawn = rng.integers(prompts, size=(DRAWS // 4, prompts))
        plain = table.mean(1)[drawn].mean(1)
        both = table[drawn[..., None], rng.integers(SEEDS, size=(*drawn.shape, SEEDS))].mean((1, 2))
        ends = [
            bootstrap(table)[1:],
            *(np.percentile(means, (2.5, 97.5)) for means in (plain, both)),
        ]
        hits += [low <= 0 <= high for low, high in ends]
    return (hits / EXPERIMENTS).tolist()


def main() -> None:
    """Print the table."""
    print(
        "| prompts | spread of prompts : of seeds | prompts | plain | both |\n|---|---|---|---|---|"
    )
    for prompts in (4, 8, 20, 40):
        for between, within in ((1, 0.3), (1, 1), (0, 1)):
            cells = " | ".join(f"{share:.3f}" for share in coverage(prompts, between, within))
            print(f"| {prompts} | {between} : {within} | {cells} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
