"""A hub on disk, in the place of huggingface_hub's `HfApi`."""

import fnmatch
import shutil
from pathlib import Path
from types import SimpleNamespace


class FakeHub:
    """Keeps each repository in a folder; one whose owner is `others` may not be written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.private: dict[str, bool] = {}

    def whoami(self) -> dict:
        return {"name": "owner"}

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        if repo_id.startswith("others/"):
            raise RuntimeError("403 Forbidden:\nyou have no rights here")
        if repo_id in self.private:
            assert exist_ok
        else:
            self.private[repo_id] = private
            (self.folder / repo_id).mkdir(parents=True)
        return f"https://huggingface.co/{repo_id}"

    def repo_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private[repo_id])

    def upload_folder(self, *, repo_id: str, folder_path, commit_message, delete_patterns) -> None:
        target = self.folder / repo_id
        for path in [p for p in target.rglob("*") if p.is_file()]:
            name = path.relative_to(target).as_posix()
            if any(fnmatch.fnmatch(name, pattern) for pattern in delete_patterns):
                path.unlink()
        shutil.copytree(folder_path, target, dirs_exist_ok=True)
