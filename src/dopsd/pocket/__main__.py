"""`python -m dopsd.pocket STAGE`: train the pocket model, stage by stage or as a whole.

The last three stages are made for `torchrun --nproc-per-node 2 -m dopsd.pocket STAGE`.
"""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)

Work = Annotated[
    Path, typer.Option(help="Folder for data and checkpoints; a stopped stage resumes from it.")
]
Compiled = Annotated[
    bool, typer.Option(help="Use torch.compile (2x faster; needs a C++ compiler).")
]
StartFrom = Annotated[
    Path | None, typer.Option(help="Earlier checkpoint whose weights are trained further.")
]
WORK = Path("runs/pocket")
PACKAGED = Path(__file__).parent / "checkpoint"


@app.command()
def data(work: Work = WORK) -> None:
    """Render the training images (2 minutes on two CPU cores)."""
    from dopsd.pocket.build.corpus import make_data

    make_data(work)


@app.command()
def vae(work: Work = WORK, steps: int = 3000) -> None:
    """Train the autoencoder and encode the images (18 minutes)."""
    from dopsd.pocket.build import train

    train.train_vae(work, steps)
    train.encode_data(work)


@app.command()
def encode(start_from: Path, work: Work = WORK) -> None:
    """Encode the images with the autoencoder of a checkpoint instead (3 minutes)."""
    from dopsd.pocket.build.train import encode_data

    encode_data(work, start_from / "vae")


@app.command()
def flow(
    work: Work = WORK, steps: int = 5000, compiled: Compiled = True, start_from: StartFrom = None
) -> None:
    """Train transformer and VLM by flow matching: the many-step model (95 minutes)."""
    from dopsd.pocket.build import train

    train.train_flow(work, steps, compiled, start_from=start_from)


@app.command()
def distill(work: Work = WORK, rounds: int = 8, compiled: Compiled = True) -> None:
    """Distill the many-step model to 4 steps on the student's own states (8 minutes)."""
    from dopsd.pocket.build import train

    train.distill(work, rounds, compiled=compiled)


@app.command()
def decoder(work: Work = WORK, steps: int = 1000) -> None:
    """Sharpen the decoder on the fixed latents (5 minutes)."""
    from dopsd.pocket.build import train

    train.sharpen_decoder(work, steps)


@app.command()
def vision(work: Work = WORK, steps: int = 1500, start_from: StartFrom = None) -> None:
    """Train a new vision tower alone (4 minutes in two processes)."""
    from dopsd.pocket.build.teacher import few_step_start
    from dopsd.pocket.build.vision import train_tower

    train_tower(work, few_step_start(work, start_from)[1], steps)


@app.command()
def teacher(
    work: Work = WORK, steps: int = 1000, start_from: StartFrom = None, compiled: Compiled = True
) -> None:
    """Train the teacher: drawing what the context's image shows (25 minutes in two processes)."""
    from dopsd.pocket.build.teacher import train_teacher

    train_teacher(work, steps, start_from, compiled)


@app.command()
def student(
    work: Work = WORK, steps: int = 320, start_from: StartFrom = None, compiled: Compiled = True
) -> None:
    """Distill to 2 steps, with and without an image in the context (20 minutes in two
    processes)."""
    from dopsd.pocket.build.student import train_student

    train_student(work, steps, start_from, compiled)


@app.command()
def assemble(work: Work = WORK, target: Path = PACKAGED, start_from: StartFrom = None) -> None:
    """Write the trained parts as a diffusers folder."""
    from dopsd.pocket.build.assemble import assemble

    assemble(work, target, start_from)


@app.command("all")
def everything(work: Work = WORK, target: Path = PACKAGED, compiled: Compiled = True) -> None:
    """Every stage in order, then the folder and its gates (about 3.5 hours on two CPU cores)."""
    data(work)
    vae(work)
    flow(work, compiled=compiled)
    distill(work, compiled=compiled)
    decoder(work)
    vision(work)
    teacher(work, compiled=compiled)
    student(work, compiled=compiled)
    assemble(work, target)
    gates(target)


@app.command()
def many_step(folder: Path) -> None:
    """Write the many-step model as a checkpoint of its own (for `model.train_on`)."""
    import shutil

    from dopsd.files import atomic_path

    if folder.exists():
        raise typer.BadParameter(f"{folder} exists and is not overwritten")
    with atomic_path(folder) as temporary:
        shutil.copytree(
            PACKAGED,
            temporary,
            ignore=shutil.ignore_patterns("parent", "transformer", "*.md", "gates.json"),
        )
        shutil.copytree(PACKAGED / "parent" / "transformer", temporary / "transformer")


@app.command()
def gates(checkpoint: Path = PACKAGED) -> None:
    """Measure the gates of a checkpoint and write them into it (4 minutes)."""
    from dopsd.pocket.gates import measure_gates

    for gate in measure_gates(checkpoint):
        mark = "passed" if gate.passed else "MISSED"
        interval = f"[{gate.low:.3f}, {gate.high:.3f}]"
        print(f"{mark}  {gate.name}: {gate.value:.3f} {interval}, wanted {gate.wanted}")


@app.command()
def images(folder: Path, seed: int = 1_000_003, count: int = 4, style: bool = False) -> None:
    """Draw captioned images of a thing, or in a style, that the pocket model never saw."""
    from dopsd.pocket.world.datasets import write_concept, write_style_concept

    if style:
        write_style_concept(folder, seed, count)
    else:
        write_concept(folder, seed, count)


@app.command()
def pairs(folder: Path, seed: int = 0, count: int = 16) -> None:
    """Draw captioned pairs of a chosen and a rejected image, for Diffusion-DPO."""
    from dopsd.pocket.world.datasets import write_pairs

    write_pairs(folder, seed, count)


if __name__ == "__main__":
    app()
