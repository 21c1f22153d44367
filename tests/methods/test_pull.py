"""How the teacher's pull is logged, against numbers computed in numpy."""

import numpy as np
import pytest
import torch

from dopsd.diffusion.flow import Schedule
from dopsd.methods import DOPSD
from dopsd.methods.pull import noise_bins

from .plain import TIMES, Plain, batch, context, roles, run

EULER = Schedule(TIMES, (0.0,) * 4)


def test_each_step_of_a_run_is_in_the_bin_of_its_time():
    bins = noise_bins(EULER, range(4))
    assert bins.names == {0: "t0.75-1.00", 1: "t0.75-1.00", 2: "t0.75-1.00", 3: "t0.50-0.75"}
    assert bins.counts == {"t0.75-1.00": 3, "t0.50-0.75": 1}
    low = noise_bins(Schedule(torch.tensor([0.6, 0.3, 0.1, 0.0]), (0.0,) * 3), [1, 2])
    assert low.names == {1: "t0.25-0.50", 2: "t0.00-0.25"}


@pytest.mark.parametrize("loss_steps", ["all", "last", (1, 3)])
def test_cosine_and_ratio_of_pull_and_error_are_means_over_rows_and_steps_of_a_bin(loss_steps):
    student, teacher, data = Plain(0), Plain(1), batch(privileged=context(3))
    method = DOPSD(loss_steps=loss_steps)
    result = run(method, roles(student, teacher), data, student)
    z = torch.randn(
        data.latents.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64
    )
    found: dict[str, list[tuple[float, float]]] = {}
    for k in range(4):
        t = TIMES[k].expand(3)
        with torch.no_grad():
            own, wanted = student(z, t, data.context), teacher(z, t, data.privileged)
        if k in method._loss_steps(4, 7):
            straight = (z - data.latents) / TIMES[k]
            name = "t0.50-0.75" if k == 3 else "t0.75-1.00"
            for row in range(3):
                pull = (wanted - own)[row].numpy().ravel()
                error = (straight - own)[row].numpy().ravel()
                lengths = np.linalg.norm(pull), np.linalg.norm(error)
                pair = (pull @ error / lengths[0] / lengths[1], lengths[0] / lengths[1])
                found.setdefault(name, []).append(pair)
        z = z + (TIMES[k + 1] - TIMES[k]) * own
    assert found
    for name, pairs in found.items():
        cosine, ratio = np.mean(pairs, axis=0)
        assert result.log[f"pull_cosine_at_{name}"] == pytest.approx(cosine, abs=1e-10)
        assert result.log[f"pull_ratio_at_{name}"] == pytest.approx(ratio, abs=1e-10)
    logged = {name for name in result.log if name.startswith("pull")}
    assert logged == {f"pull_{kind}_at_{name}" for kind in ("cosine", "ratio") for name in found}


def test_a_teacher_that_shows_the_image_itself_has_cosine_and_ratio_1():
    student, data = Plain(0), batch(privileged=context(3))

    def teacher(z, t, text):
        return (z - data.latents) / t.view(-1, 1, 1, 1)

    result = run(DOPSD(), roles(student, teacher), data, student)
    shown = [value for name, value in result.log.items() if name.startswith("pull")]
    assert len(shown) == 4 and shown == pytest.approx([1.0] * 4, abs=1e-10)
