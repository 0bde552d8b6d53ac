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
        revision: branch to commit to; "main" if None.

    Returns:
        The commit's address.
    """
    from huggingface_hub import HfApi

    if repo_id.count("/") > 1 or not repo_id.strip("/"):
        raise ValueError(f"repo_id={repo_id!r} is no Hub id: give 'user/name'")
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    done = api.upload_folder(
        repo_id=repo, folder_path=folder, revision=revision, commit_message=commit_message, repo_type="model"
    )
    return str(done.commit_url)
