"""`dopsd export`, `upload`: a result in the form that other software wants, and on the hub."""

from pathlib import Path
from typing import Annotated

import typer

from dopsd.cli.console import say
from dopsd.cli.options import LORA_HELP, DistilledBy, Strength, TakenModel

FORM_HELP = "Of a LoRA: diffusers, comfyui (what most software reads), kohya, or peft (a folder)."


def export(
    source: Annotated[
        str, typer.Argument(help=f"Run folder, model folder, or {LORA_HELP}.", show_default=False)
    ],
    form: Annotated[str | None, typer.Option("--format", help=FORM_HELP)] = None,
    single_file: Annotated[
        bool,
        typer.Option(
            "--single-file",
            help="The whole network as one file with the original model's names, as ComfyUI's "
            "Load Diffusion Model opens it; LoRAs are added to its weights.",
        ),
    ] = False,
    fp8: Annotated[
        bool, typer.Option("--fp8", help="With --single-file: layers as scaled float8.")
    ] = False,
    model: TakenModel = None,
    strength: Strength = 1.0,
    distilled_by: DistilledBy = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File or folder to write; default: named after the source, here."),
    ] = None,
) -> None:
    """Write a result in another form: a LoRA under other names, or a whole network as one file."""
    from dopsd.models.folder import is_model
    from dopsd.models.lora_forms import FORMS
    from dopsd.models.native_file import export_single_file
    from dopsd.runs.outputs.lora_export import convert_lora
    from dopsd.runs.outputs.upload import result_of

    given = result_of(Path(source)) if (Path(source) / "config.yaml").is_file() else Path(source)
    if single_file == (form is not None):
        raise ValueError(f"give --format ({', '.join(FORMS)}), or --single-file.")
    if fp8 and not single_file:
        raise ValueError("--fp8 is for --single-file: LoRA files stay in float32.")
    if single_file:
        target = out or Path(f"{given.stem}-native{'-fp8' if fp8 else ''}.safetensors")
        whole = given if is_model(given) else [str(given)]
        export_single_file(whole, target, model, strength, distilled_by, fp8)
        say(f"{target}; copy it to ComfyUI/models/diffusion_models")
        return
    if form not in FORMS:
        raise ValueError(f"--format {form} is not one of {', '.join(FORMS)}.")
    if is_model(given):
        raise ValueError(f"{given} is a whole model and no LoRA: give --single-file.")
    target = out or Path(f"{given.stem}-{form}" + (".safetensors" if form != "peft" else ""))
    convert_lora(given, form, target)
    say(f"{target}: {FORMS[form]}")


def upload(
    run_folder: Annotated[
        Path, typer.Argument(help="Folder of a finished run.", show_default=False)
    ],
    repository: Annotated[
        str | None, typer.Argument(help="owner/name on the hub.", show_default=False)
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Write the files to this folder instead of uploading.")
    ] = None,
    captions: Annotated[
        bool, typer.Option("--captions", help="Also show previews whose prompts are captions.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
) -> None:
    """Upload a finished run to the hub: the weights, a model card and the images in it, no captions
    and no paths."""
    from tempfile import TemporaryDirectory

    from dopsd.models.hub import is_hub_id
    from dopsd.models.hub import upload as upload_folder
    from dopsd.runs.outputs.upload import gather_upload

    if (repository is None) == (folder is None):
        raise ValueError("give a repository (owner/name), or --folder to write the files here.")
    if folder:
        gather_upload(run_folder, folder, None, captions)
        say(f"{folder} holds what a stranger needs; upload it as it is")
        return
    if repository is None or not is_hub_id(repository):
        raise ValueError(f"{repository} is no name on the hub: give owner/name.")
    with TemporaryDirectory() as temporary:
        gathered = Path(temporary) / "upload"
        gather_upload(run_folder, gathered, repository.partition("/")[0], captions)
        say(upload_folder(gathered, repository, private))
