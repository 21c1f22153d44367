"""Checkpoints: a local folder, or a repository on the hub whose parts are fetched on demand; what
libraries say of a broken one becomes one sentence."""

import errno
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What is known without weights; tokenizers included.
CONFIGS = ("*.json", "*.txt", "*.jinja", "*.model")
# Not the weights of all parts in one file, nor those of other libraries.
WHOLE = (*CONFIGS, "*.md", "*/*.safetensors")
HALF_PRECISION = ("*.fp16.safetensors",)  # a second copy of the weights
WEIGHT_ENDINGS = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin", ".onnx")
NOISY = ("bitsandbytes", "diffusers", "transformers")


def reason_of(error: Exception) -> str:
    """A library's error as its kind and the start of its first line."""
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line[:200]}"


class Checkpoint:
    """A checkpoint's local `folder` of configs and safetensors. Of a hub repository it holds only
    the configs at first."""

    def __init__(self, name: str, revision: str | None = None, called: str | None = None):
        """name: local folder or hub id. called: its name in messages. Raises ValueError where it
        does not exist or cannot be fetched."""
        self.name, self._repo = called or name, None if os.path.isdir(name) else name
        if self._repo is None:
            self.folder = Path(name)
        elif os.path.isfile(name):
            raise ValueError(f"{self.name} is a file: give a folder, or a hub id like owner/name.")
        elif not is_hub_id(name):
            raise ValueError(
                f"{self.name} does not exist: give a folder, or a hub id like owner/name."
            )
        else:
            self.folder = _fetch(name, revision, CONFIGS)

    def refuse_missing(self, parts: Sequence[str], index: Mapping[str, Any], family: str) -> None:
        """Raise ValueError where one of a family's parts is not in model_index.json, or has no
        folder."""
        if missing := [part for part in parts if not index.get(part)]:
            raise ValueError(
                f"{self.name} lacks {', '.join(missing)} in its model_index.json: "
                f"it is not a complete {family}."
            )
        if missing := [part for part in parts if not (self.folder / part).is_dir()]:
            raise ValueError(
                f"{self.name} lacks the folder {', '.join(missing)}: the checkpoint is incomplete."
            )

    def part(self, name: str = ".") -> Path:
        """The folder of a part (".": the whole is one model) with its weights. Raises ValueError
        where it has none."""
        part = self.folder / name
        patterns = [f"{name}/*.safetensors" if name != "." else "*.safetensors"]
        if self._repo is not None:
            # By the commit of the configs, whatever is pushed meanwhile.
            _fetch(self._repo, self.folder.name, patterns, HALF_PRECISION)
            if not any(part.glob("*.safetensors")):  # only in half precision
                _fetch(self._repo, self.folder.name, patterns)
        if not any(part.glob("*.safetensors")):
            raise ValueError(
                f"{self.name}: {name} holds no .safetensors weights; "
                "it is incomplete or in another format."
            )
        return part

    def mark(self, distilled_by: str | None) -> list[Any]:
        """An identity of its weights, and of a file that distils it, as JSON: the commit on the
        hub, or name, size and time of local files."""
        distiller = _mark_of(distilled_by or "")
        if self._repo is not None:
            return [[self._repo, self.folder.name], distiller]
        files = sorted(self.folder.rglob("*.safetensors"))
        return [
            [[file.relative_to(self.folder).as_posix(), *_mark_of(file)] for file in files],
            distiller,
        ]

    @contextmanager
    def reading(self, part: str) -> Iterator[None]:
        """A block in which a library reads a part. Any error becomes a ValueError of one sentence;
        the libraries' warnings and progress bars are off."""
        try:
            with quiet_libraries():
                yield
        # Configs and weights of any content: KeyError, TypeError, SafetensorError, ...
        except Exception as error:
            raise ValueError(
                f"{self.name}: {part} cannot be read ({reason_of(error)}); "
                "it is missing, damaged or in another format."
            ) from error

    def whole(self) -> Path:
        """The folder with every part of the repository."""
        if self._repo is not None:
            _fetch(self._repo, self.folder.name, WHOLE, HALF_PRECISION)
            for config in self.folder.glob("*/config.json"):
                self.part(config.parent.name)  # also those only in half precision
        return self.folder


def is_hub_id(name: str) -> bool:
    """Whether a name has the form owner/name; a file of weights has not."""
    is_file = name.endswith(WEIGHT_ENDINGS)
    return not name.startswith((".", "/", "~")) and name.count("/") == 1 and not is_file


def is_hub_file(name: str) -> bool:
    """Whether a name has the form owner/name/file."""
    return not name.startswith((".", "/", "~")) and name.count("/") >= 2 and name[-1] != "/"


def variant_of(part: Path) -> str | None:
    """diffusers' `variant` for a folder of weights: "fp16" where it holds no others."""
    is_half = all(file.match(HALF_PRECISION[0]) for file in part.glob("*.safetensors"))
    return "fp16" if is_half else None


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """A block in which the libraries that open models log nothing below errors and draw no progress
    bars."""
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    modules = [sys.modules.get(f"{name}.utils.logging") for name in ("diffusers", "transformers")]
    with_bars = [module for module in modules if module and module.is_progress_bar_enabled()]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    for module in with_bars:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for module in with_bars:
            module.enable_progress_bar()


def _mark_of(file: str | Path) -> list[Any]:
    """Size and time of a local file; otherwise its address on the hub."""
    if not Path(file).is_file():
        return [str(file)]
    status = Path(file).stat()
    return [status.st_size, status.st_mtime_ns]


def weights_file(name: str, called: str) -> Path:
    """A safetensors file by its path, or on the hub as owner/name/file. called: the recipe key that
    names it, for messages. Raises ValueError where it does not exist."""
    if Path(name).is_file():
        return Path(name)
    repository, file = hub_address(name, called)
    path = _fetch(repository, None, [file]) / file
    if not path.is_file():
        raise ValueError(f"{called}: {repository} on the hub holds no {file}.")
    return path


def adapter_on_hub(repo: str, usual_names: Sequence[str]) -> Path:
    """The folder of a LoRA's repository on the hub, with its adapter_config.json and the file of a
    usual name, or else the .safetensors files at its root. Raises ValueError where it cannot be
    fetched."""
    folder = _fetch(repo, None, ["adapter_config.json", *usual_names])
    if any((folder / name).is_file() for name in usual_names):
        return folder
    return _fetch(repo, None, ["*.safetensors"], ["*/*"])


def upload(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder to a repository on the hub, which is made where it does not exist; its
    address. Raises ValueError where nobody is logged in, or the hub refuses."""
    from huggingface_hub import HfApi

    with _refusals(repo, None):
        api = HfApi()
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload by dopsd")
    return str(address)


def weights_here(name: str, called: str) -> Path | None:
    """Such a file where it is on this machine; None where it is only on the hub. Raises ValueError
    where it does not exist, without fetching it."""
    if Path(name).is_file():
        return Path(name)
    from huggingface_hub import HfApi, try_to_load_from_cache

    repository, file = hub_address(name, called)
    with _refusals(repository, None):
        cached = try_to_load_from_cache(repository, file)
        exists = isinstance(cached, str) or HfApi().file_exists(repository, file)
    if not exists:
        raise ValueError(
            f"{called}: there is no {file} in {repository} on the hub, or it is private."
        )
    return Path(cached) if isinstance(cached, str) else None


def hub_address(name: str, called: str) -> tuple[str, str]:
    """Repository and file of owner/name/file. Raises ValueError, naming the key `called`, for
    another form."""
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    if not is_hub_file(name):
        raise ValueError(
            f"{called} {name} does not exist: "
            "give a file, or owner/name/file.safetensors on the hub."
        )
    return f"{owner}/{repository}", file


def _fetch(
    repo: str, revision: str | None, patterns: Sequence[str], without: Sequence[str] = ()
) -> Path:
    """The snapshot's folder with the matching files up to date; from the cache where the hub cannot
    be reached."""
    from huggingface_hub import snapshot_download

    with _refusals(repo, revision):
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(without),
            )
        )


@contextmanager
def _refusals(repo: str, revision: str | None) -> Iterator[None]:
    """A block that calls the hub: any error becomes a ValueError of one sentence."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except HFValidationError as error:
        raise ValueError(
            f"{repo} is neither a local folder nor a valid name on the hub."
        ) from error
    except GatedRepoError as error:
        raise ValueError(
            f"{repo} is gated: accept its licence on the hub, then run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(
            f"{repo} has no revision {revision} on the hub: see model.revision."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{repo} is neither a local folder nor a repository on the hub (or it is private)."
        ) from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{repo} is not a local folder and not complete in the hub's cache, and the hub could "
            "not be reached: go online, or give a folder."
        ) from error
    except HfHubHTTPError as error:
        raise ValueError(
            f"the hub did not give {repo} ({str(error).splitlines()[0]}): try again."
        ) from error
    # The client's transport raises errors of its own: proxies, broken connections, ...
    except Exception as error:
        if not isinstance(error, OSError) or error.errno != errno.ENOSPC:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{repo} could not be fetched ({reason}): what was downloaded is kept."
            ) from error
        free = shutil.disk_usage(Path(constants.HF_HUB_CACHE).anchor or ".").free / 2**30
        raise ValueError(
            f"no space left for {repo}: {free:.1f} GiB are free at {constants.HF_HUB_CACHE}. "
            "Free some, or set HF_HOME to another disk; what was downloaded is kept."
        ) from error
