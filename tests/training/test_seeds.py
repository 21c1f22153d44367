"""Training draws from other seeds than anything that generates images."""

import torch

from dopsd.diffusion.sampling import noise_for
from dopsd.evaluation.health import FIRST_SEED, OTHER_SEED
from dopsd.evaluation.image_sets import FIRST_NOISE, OTHER_NOISE
from dopsd.runs.class_images import FIRST_SEED as FIRST_CLASS_IMAGE
from dopsd.runs.comparison.plain_images import NEUTRAL_SEEDS
from dopsd.training.loop import generator_at
from dopsd.training.seeds import adapter_seed, noise_seed

RUNS = [(seed, index) for seed in (0, 1, 7, 2**31 - 1) for index in range(500)]


def test_micro_batches_never_draw_the_noise_that_images_are_generated_from():
    of_images = {row.numpy().tobytes() for row in noise_for(range(500), 2, 2, 2).draw()[0]}
    for seed, index in RUNS:
        noise = torch.randn(2, 2, 2, generator=generator_at(seed, index))
        assert noise.numpy().tobytes() not in of_images


def test_no_training_seed_lies_where_images_have_theirs():
    """torch's CPU generator uses the lowest 32 bits of a seed."""

    def draw(seed):
        return torch.randn(4, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(5), draw(5 + 2**32)) and not torch.equal(draw(5), draw(5 + 2**31))
    of_images = [0, FIRST_SEED, OTHER_SEED + FIRST_SEED, FIRST_NOISE, OTHER_NOISE]
    assert max(*of_images, *NEUTRAL_SEEDS, FIRST_CLASS_IMAGE + 10**6) < 2**31
    seeds = [noise_seed(*run) for run in RUNS] + [adapter_seed(run[0]) for run in RUNS]
    assert all(2**31 <= seed < 2**32 for seed in seeds)


def test_runs_of_neighbouring_seeds_share_no_noise_and_the_same_run_repeats_its_own():
    assert len({noise_seed(*run) for run in RUNS}) == len(RUNS)
    assert noise_seed(3, 4) == noise_seed(3, 4)
    assert {adapter_seed(seed) for seed, _ in RUNS}.isdisjoint(noise_seed(*run) for run in RUNS)


def test_class_images_share_no_seed_with_health_checks_and_comparisons():
    of_class_images = range(FIRST_CLASS_IMAGE, FIRST_CLASS_IMAGE + 10**6)
    others = [FIRST_SEED, OTHER_SEED + FIRST_SEED, FIRST_NOISE, OTHER_NOISE, *NEUTRAL_SEEDS]
    assert not any(seed in of_class_images for seed in others)
    assert FIRST_CLASS_IMAGE > OTHER_NOISE + 10**8
