"""Models of the Hugging Face Hub: only the files that are needed, configuration before weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compactor_vllm.errors import CheckpointError
from compactor_vllm.utils.checkpoint import indexed_files, plain_files

CONFIG_PATTERNS = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "*.jinja",
)


def fetch_config(repo_id: str, revision: str | None, *, show_progress: bool) -> Path:
    """Directory with the configuration and tokenizer of a hub id; HF_HUB_OFFLINE and the hub's cache are honoured.

    Raises:
        CheckpointError: no such repository or revision, no access, or neither a connection nor a cached copy.
    """
    directory = _snapshot(repo_id, revision, CONFIG_PATTERNS, show_progress)
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{repo_id} has no config.json; for a repository of GGUF files, download one and give its path as the model"
        )
    return directory


def fetch_weights(repo_id: str, revision: str | None, directory: Path, *, show_progress: bool) -> Path:
    """Downloads the safetensors that belong to a directory of `fetch_config`; nothing when they are there.

    Returns:
        the directory that they are in.
    """
    names = indexed_files(directory) or ["model.safetensors"]
    if all((directory / name).is_file() for name in names):
        return directory
    fetched = _snapshot(repo_id, revision, names, show_progress)
    if not any((fetched / name).is_file() for name in names) and not plain_files(fetched):
        fetched = _snapshot(repo_id, revision, ["*.safetensors"], show_progress)
        _refuse_pickles_only(repo_id, revision, fetched)
    return fetched


def _refuse_pickles_only(repo_id: str, revision: str | None, directory: Path) -> None:
    from huggingface_hub import HfApi

    from compactor_vllm.utils.checkpoint import no_weights_message

    if not plain_files(directory):
        try:
            files = HfApi().list_repo_files(repo_id, revision=revision)
        except Exception:
            files = []
        raise CheckpointError(no_weights_message(repo_id, files))


def _snapshot(repo_id: str, revision: str | None, patterns: Any, show_progress: bool) -> Path:
    import httpx
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import tqdm

    class SilentBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **{**kwargs, "disable": True})

    try:
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=list(patterns),
                tqdm_class=None if show_progress else SilentBar,
            )
        )
    except errors.HFValidationError as error:
        raise CheckpointError(f"{repo_id!r} is neither an existing path nor a valid hub id: {error}") from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repo_id} is gated: ask for access on its page, then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo_id} is not a public repository of the Hugging Face Hub (nor a local path or built-in model); "
            "for a private one, log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo_id} has no revision {revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repo_id} is not in the local cache and the Hugging Face Hub cannot be reached "
            "(offline, or HF_HUB_OFFLINE is set); a local directory or a built-in model needs no connection"
        ) from error
    except (errors.HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise CheckpointError(f"{repo_id} could not be downloaded: {error}") from error
