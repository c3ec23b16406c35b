"""Publishing a directory on the Hugging Face hub, when it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hici.adapters.verify import verify


def push_to_hub(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload HiCI model",
    token: str | None = None,
) -> Any:
    """Publish a directory that `save_pretrained`, `convert` or `merge` wrote, through huggingface_hub.

    Args:
        directory: what to upload; all of its files.
        repo_id: owner/name; made when it does not exist.
        private: of a new repository; None: the account's default.
        revision: branch to upload to.
        token: None: the stored login.

    Returns:
        huggingface_hub's CommitInfo.

    Raises:
        ValueError: no such directory, or no model in it; a directory that `hici verify` finds fault with.
    """
    from huggingface_hub import HfApi

    directory = Path(directory).expanduser()
    report = verify(directory)
    if report.problems:
        raise ValueError(f"{directory} is not published, since it is not whole: {report.problems[0].text} (all of it: "
                         f"hici verify {directory})")  # fmt: skip
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    return api.upload_folder(repo_id=repo_id, folder_path=directory, revision=revision, commit_message=commit_message)
