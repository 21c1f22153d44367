"""A stage's training loop resumes, and processes average their gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dopsd.files import read_tensors
from dopsd.pocket.build import corpus, stages


def test_a_killed_and_resumed_stage_equals_the_uninterrupted_one_bitwise(tmp_path):
    def run(folder, stop=None):
        torch.manual_seed(0)
        net = nn.Linear(3, 1)

        def loss_at(step):
            if step == stop:
                raise KeyboardInterrupt
            x = torch.from_numpy(corpus.rng_at("toy", step).normal(size=(8, 3))).float()
            return (net(x) - x.sum(1, keepdim=True)).square().mean()

        stage = stages.Stage("toy", 12, 1e-2, warm_up=2, average_decay=0.9, save_every=4)
        return stages.optimise(stage, folder, {"net": net}, loss_at)

    straight = run(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stop=7)
    resumed = run(tmp_path / "killed")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


TOY = """
import sys
from pathlib import Path
import torch
from torch import nn
from dopsd.pocket.build.corpus import rng_at
from dopsd.pocket.build.stages import Stage, optimise, process_rank

rank = process_rank()
torch.manual_seed(0)
net = nn.Linear(3, 1)

def loss_at(step):
    x = torch.from_numpy(rng_at("toy", step, rank).normal(size=(4, 3))).float()
    return (net(x) - x.sum(1, keepdim=True)).square().mean()

optimise(Stage("toy", 5, 1e-2, warm_up=2), Path(sys.argv[1]), {"net": net}, loss_at)
"""


def test_two_processes_equal_one_on_both_batches(tmp_path):
    """The mean over two processes of a mean over 4 rows is the mean over their 8 rows."""
    script = tmp_path / "toy.py"
    script.write_text(TOY)
    (tmp_path / "two").mkdir()
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(script), str(tmp_path / "two")),
        ],
        check=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    torch.manual_seed(0)
    net = nn.Linear(3, 1)

    def loss_at(step):
        rows = [corpus.rng_at("toy", step, rank).normal(size=(4, 3)) for rank in (0, 1)]
        x = torch.tensor([row.tolist() for batch in rows for row in batch])
        return (net(x) - x.sum(1, keepdim=True)).square().mean()

    stage = stages.Stage("toy", 5, 1e-2, warm_up=2)
    one = stages.optimise(stage, tmp_path, {"net": net}, loss_at)
    two = read_tensors(Path(tmp_path / "two" / "toy.safetensors"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6)
