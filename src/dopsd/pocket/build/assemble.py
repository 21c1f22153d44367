"""The trained parts as the pocket checkpoint, in bfloat16."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from dopsd.files import read_tensors, write_text
from dopsd.pocket.build import architecture as parts
from dopsd.pocket.build.student import many_step_transformer, trained_teacher
from dopsd.pocket.build.train import without_prefix


def assemble(folder: Path, target: Path, start_from: Path | None = None) -> None:
    """Write the diffusers folder, with the many-step transformer in `parent`.

    start_from: the checkpoint that the last stages started from; its language model, VAE and
    many-step transformer are kept. Without one they are those of the stages in `folder`.
    """
    network = trained_teacher(folder, start_from, compiled=False)
    parent = parts.make_transformer()
    parent.load_state_dict(many_step_transformer(folder, start_from))
    parent.to(torch.bfloat16).save_pretrained(target / "parent" / "transformer")
    student = without_prefix(read_tensors(folder / "student.safetensors"), "transformer.")
    network.transformer.load_state_dict(student)
    network.to(torch.bfloat16)
    vae = AutoencoderKL.from_pretrained(start_from / "vae" if start_from else folder / "vae-sharp")
    vae.register_to_config(_name_or_path="vae")  # not a path of this machine
    parts.save_pipeline(
        target, network.transformer, vae.to(torch.bfloat16), network.vlm, parts.make_tokenizer()
    )
    card = Path(__file__).parent / "card.md"
    write_text(target / "README.md", card.read_text(encoding="utf-8"))
