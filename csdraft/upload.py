"""Uploads a folder to the Hub in one commit."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.utils import HFValidationError

__all__ = ["upload"]


def upload(
    folder: Path,
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with csdraft",
) -> str:
    """Commits every file of `folder` to a repository, which is created if needed.

    Args:
        repo_id: "user/name".
        token: a token with write access; None uses the one that `hf auth login` stored.
        private: whether a new repository is private; None uses the account's default.
        revision: branch to commit to, created if needed; None is "main".

    Returns:
        The commit's address.

    Raises:
        ValueError: `repo_id` is not a valid Hub id.
    """
    api = huggingface_hub.HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r} is not a Hub id, give 'user/name': {error}") from error
    if revision is not None and not revision.startswith("refs/"):  # the branch of a pull request exists
        api.create_branch(repo, branch=revision, exist_ok=True)
    done = api.upload_folder(
        repo_id=repo, folder_path=folder, revision=revision, commit_message=commit_message, repo_type="model"
    )
    return str(done.commit_url)
