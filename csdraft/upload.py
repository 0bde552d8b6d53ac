"""A folder to the Hub, in one commit."""

from __future__ import annotations

from pathlib import Path

__all__ = ["upload"]


def upload(
    folder: Path,
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with csdraft",
) -> str:
    """Creates the repository if there is none and commits every file of `folder` to it.

    Args:
        repo_id: "user/name".
        token: with the right to write; the one that `hf auth login` stored if None.
        private: of a new repository; the account's default if None.
        revision: branch to commit to, made if it is not there; "main" if None.

    Returns:
        The commit's address.

    Raises:
        ValueError: `repo_id` cannot be one of the Hub.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r} is no Hub id, give 'user/name': {error}") from error
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):  # those of pull requests are there
        api.create_branch(repo, branch=revision, exist_ok=True)
    done = api.upload_folder(
        repo_id=repo, folder_path=folder, revision=revision, commit_message=commit_message, repo_type="model"
    )
    return str(done.commit_url)
