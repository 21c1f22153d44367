"""The last distillation's targets."""

import torch

from dopsd.pocket.build import student
from dopsd.pocket.build.train import sampler_times


def test_a_chord_is_the_slope_between_the_ends_of_a_known_flow():
    """The fine model's velocity depends on t alone, so its Euler integral has a closed form, and
    the student, which has another velocity, decides where the second chord starts."""
    noise = torch.randn(3, 8, 16, 16)
    context, mask = torch.zeros(3, 32, 128), torch.ones(3, 32, dtype=torch.bool)

    def fine_model(z, t):
        return t.view(-1, 1, 1, 1).expand_as(z)

    def student_model(z, t, context, mask):
        return torch.full_like(z, 5.0)

    chords = student._chords(student_model, fine_model, context, mask, noise)
    times = sampler_times(2 * student.SUBSTEPS)
    middle = student.SUBSTEPS
    areas = times[:-1] * times.diff()
    for k, part in enumerate((slice(0, middle), slice(middle, 2 * middle))):
        slope = areas[part].sum() / times.diff()[part].sum()
        torch.testing.assert_close(chords.slope[k], slope.expand_as(noise))
    torch.testing.assert_close(chords.z[0], noise)
    torch.testing.assert_close(chords.z[1], noise + 5 * (times[middle] - 1))
