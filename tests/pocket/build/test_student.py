"""The last distillation's targets and loss."""

import torch

from dopsd.pocket.build import architecture as parts
from dopsd.pocket.build import student
from dopsd.pocket.build.train import sampler_times


def test_the_loss_is_the_distance_to_the_slopes_of_a_known_flow():
    """The fine model's velocity depends on t alone, so its Euler integral has a closed form; the
    student's is constant."""
    noise = torch.randn(3, 8, 16, 16)
    loss, end, wanted = student.distillation(
        lambda z, t: torch.full_like(z, 5.0),
        lambda z, t: t.view(-1, 1, 1, 1).expand_as(z),
        noise,
        fine_steps=8,
    )
    times = sampler_times(8)
    areas, lengths = times[:-1] * times.diff(), times.diff()
    slopes = [areas[part].sum() / lengths[part].sum() for part in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(loss, sum((slope - 5) ** 2 for slope in slopes))
    middle = noise + 5 * (times[4] - 1)
    torch.testing.assert_close(end, middle - 5 * times[4])
    torch.testing.assert_close(wanted, middle + areas[4:].sum())


def test_edges_of_a_blurred_image_are_further_than_its_own():
    vae = parts.make_vae()
    latents = torch.randn(2, 8, 16, 16)
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    assert student.edge_distance(vae, latents, latents) == 0
    blurred = torch.nn.functional.avg_pool2d(latents, 3, 1, 1)
    assert student.edge_distance(vae, blurred, latents) > 0.01
