"""Where a checkpoint lies: a local folder, or a repository on the hub whose parts are fetched when
asked for."""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CONFIGS = (
    "*.json",
    "*.txt",
    "*.jinja",
    "*.model",
)  # what can be known without weights, tokenizers included
WHOLE = (
    *CONFIGS,
    "*.md",
    "*/*.safetensors",
)  # not the weights of all parts in one file, nor those of other libraries
TWICE = ("*.fp16.safetensors",)  # the same weights again, in half precision


class Checkpoint:
    """A folder of configs and safetensors, `folder`. Of a hub repository only the configs are there
    at first."""

    def __init__(self, name: str, revision: str | None = None, called: str | None = None):
        """name: local folder or hub id; called: how sentences speak of it. Raises ValueError, in
        one sentence, when there is no such thing."""
        self.name, self._repo = called or name, None if os.path.isdir(name) else name
        if self._repo is None:
            self.folder = Path(name)
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
                f"{self.name} lacks {', '.join(missing)} in its model_index.json: it is no whole {family}."
            )
        if missing := [part for part in parts if not (self.folder / part).is_dir()]:
            raise ValueError(
                f"{self.name} lacks the folder {', '.join(missing)}: the checkpoint is incomplete."
            )

    def part(self, name: str = ".") -> Path:
        """The folder of a part (".": the whole is one model) with its weights. Raises ValueError
        when it has none."""
        part, patterns = (
            self.folder / name,
            [f"{name}/*.safetensors" if name != "." else "*.safetensors"],
        )
        if (
            self._repo is not None
        ):  # by the commit that the configs are of, whatever is pushed meanwhile
            _fetch(self._repo, self.folder.name, patterns, TWICE)
            if not any(part.glob("*.safetensors")):  # there in half precision alone
                _fetch(self._repo, self.folder.name, patterns)
        if not any(part.glob("*.safetensors")):
            raise ValueError(
                f"{self.name}: {name} holds no .safetensors weights; it is incomplete, or of another form."
            )
        return part

    def mark(self, distilled_by: str | None) -> list[Any]:
        """What tells its weights, and those of a file that distils it, from others, as JSON: the
        commit on the hub, or name, size and time of local files."""
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
        """A block in which a library reads a part: whatever it says of a damaged file becomes one
        sentence."""
        try:
            yield
        except (
            Exception
        ) as error:  # configs and weights of any content: KeyError, TypeError, SafetensorError, ...
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"{self.name}: {part} cannot be read ({type(error).__name__}: {reason[:200]}); it is missing, damaged, "
                "or of another form."
            ) from error

    def whole(self) -> Path:
        """The folder with every part of the repository."""
        if self._repo is not None:
            _fetch(self._repo, self.folder.name, WHOLE, TWICE)
            for config in self.folder.glob("*/config.json"):
                self.part(config.parent.name)  # where it is there in half precision alone
        return self.folder


def is_hub_id(name: str) -> bool:
    """Whether a name has the form owner/name."""
    return not name.startswith((".", "/", "~")) and name.count("/") == 1


def is_hub_file(name: str) -> bool:
    """Whether a name has the form owner/name/file."""
    return not name.startswith((".", "/", "~")) and name.count("/") >= 2 and name[-1] != "/"


def variant_of(part: Path) -> str | None:
    """The libraries' word for weights that are there in half precision alone."""
    return (
        "fp16"
        if all(file.name.endswith(TWICE[0][1:]) for file in part.glob("*.safetensors"))
        else None
    )


def _mark_of(file: str | Path) -> list[Any]:
    """Of one file: size and time, or its address on the hub."""
    if not Path(file).is_file():
        return [str(file)]
    found = Path(file).stat()
    return [found.st_size, found.st_mtime_ns]


def weights_file(name: str, called: str) -> Path:
    """A safetensors file by its path, or on the hub as owner/name/file. called: the key that names
    it, for sentences. Raises ValueError when there is no such thing."""
    if Path(name).is_file():
        return Path(name)
    repository, file = hub_address(name, called)
    found = _fetch(repository, None, [file]) / file
    if not found.is_file():
        raise ValueError(f"{called}: {repository} on the hub holds no {file}.")
    return found


def weights_here(name: str, called: str) -> Path | None:
    """Such a file if it is on this machine; None where it is on the hub alone. Raises ValueError
    when there is no such thing, without fetching it."""
    if Path(name).is_file():
        return Path(name)
    from huggingface_hub import HfApi, try_to_load_from_cache

    repository, file = hub_address(name, called)
    with _refusals(repository, None):
        cached = try_to_load_from_cache(repository, file)
        there = isinstance(cached, str) or HfApi().file_exists(repository, file)
    if not there:
        raise ValueError(
            f"{called}: there is no {file} in {repository} on the hub, or it is private."
        )
    return Path(cached) if isinstance(cached, str) else None


def hub_address(name: str, called: str) -> tuple[str, str]:
    """Repository and file of owner/name/file. Raises ValueError, naming the key `called`, for any
    other form."""
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    if not is_hub_file(name):
        raise ValueError(
            f"{called} {name} does not exist: give a file, or owner/name/file.safetensors on the hub."
        )
    return f"{owner}/{repository}", file


def _fetch(
    repo: str, revision: str | None, patterns: Sequence[str], without: Sequence[str] = ()
) -> Path:
    """The snapshot folder, these files of it up to date; from the cache where the hub cannot be
    reached."""
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
    """A block that asks the hub: whatever it says becomes one sentence."""
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
            f"{repo} is neither a local folder nor a name that the hub could have."
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
            f"{repo} is no local folder, is not whole in the hub's cache, and the hub could not be reached: go online, "
            "or give a folder."
        ) from error
    except HfHubHTTPError as error:
        raise ValueError(
            f"the hub did not give {repo} ({str(error).splitlines()[0]}): try again."
        ) from error
    except (
        Exception
    ) as error:  # the client's transport raises its own kinds: proxies, broken connections, ...
        if not isinstance(error, OSError) or error.errno != errno.ENOSPC:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{repo} could not be fetched ({reason}): what has come so far is kept."
            ) from error
        free = shutil.disk_usage(Path(constants.HF_HUB_CACHE).anchor or ".").free / 2**30
        raise ValueError(
            f"no space left for {repo}: {free:.1f} GiB are free at {constants.HF_HUB_CACHE}. Make room, or set HF_HOME "
            "to another disk; what has come so far is kept."
        ) from error
