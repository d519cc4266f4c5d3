"""The hub: single files of an adapter down, whole directories up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .errors import AdapterFileError

CARD_NAME = "README.md"


def download(repo: str, name: str, subfolder: str | None = None, **hub: Any) -> Path:
    """Path of a file of a hub repository, downloaded or in the cache.

    hub: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

    Raises:
        AdapterFileError: it can't be had, with what was looked for, where, and why that failed.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, name, subfolder=subfolder, **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterFileError(_what_failed(repo, name, subfolder, hub.get("revision"), error)) from error


def _what_failed(repo: str, name: str, subfolder: str | None, revision: str | None, error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    path = f"{subfolder}/{name}" if subfolder else name
    reasons = {
        hub.HFValidationError: "that is no hub id either, which reads NAMESPACE/NAME",
        hub.GatedRepoError: "access to it is restricted: ask for it on its page, and pass your `token`",
        hub.RevisionNotFoundError: f"it has no revision {revision!r}",
        hub.RepositoryNotFoundError: "no such repository, or a private one, which takes a `token` that may read it",
        hub.EntryNotFoundError: "the repository is there, the file is not",
        hub.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set, and the file is not in the cache",
    }
    if isinstance(error, hub.LocalEntryNotFoundError):  # an EntryNotFoundError too, though nobody was asked
        why = "it is not in the cache, and the hub was not asked or could not be reached"
    else:
        why = next((text for kind, text in reasons.items() if isinstance(error, kind)), f"{error}")
    place = f"'{repo}'" + (f" at revision {revision!r}" if revision else "")
    return (
        f"Can't find '{path}' at {place}: there is no local directory of that name, and at {constants.ENDPOINT}: {why}"
    )


def push(
    save: Callable[[Path], None],
    repo_id: str,
    *,
    commit_message: str = "Upload adapter",
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: Sequence[str] | None = None,
) -> str:
    """Upload what `save` writes into a directory, as one commit, to a repository that is made if it is not there.

    A model card that the repository has is what `save` finds, so that a user's text in it stays.

    Arguments:
        private: of a new repository; None leaves it to the hub.
        token: None takes the one that `hf auth login` stored.
        revision: branch to commit to, made if it is not there.
        tags: further tags for the model card.

    Returns:
        The address of the commit.
    """
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with TemporaryDirectory() as folder:
        directory = Path(folder)
        with suppress(EntryNotFoundError, RevisionNotFoundError):  # then it has no card yet
            api.hf_hub_download(repo_id, CARD_NAME, revision=revision, local_dir=directory)
        save(directory)
        if tags:
            card = ModelCard.load(directory / CARD_NAME)
            card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))  # pyright: ignore
            card.save(directory / CARD_NAME)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=[".cache/**"],
        )
