"""The store's mirror on object storage: what one machine computed, every other fetches.

Layout: ``<url>/<kind>/<digest>/manifest.json`` names the files; their bytes lie under ``<url>/files/<sha256>``. The
manifest is written last, so an artifact is there whole or not at all; equal files are stored once; a broken upload or
download goes on with what is missing.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Final

from merging_core.digest import file_sha256
from merging_core.errors import CheckpointError
from merging_core.streamed import require_files
from tasks.progress import track
from tasks.remote import Storage
from tasks.store import MANIFEST, Manifest, Ref, Store

_FILES: Final = "files"


class Mirror:
    """Finished artifacts on object storage."""

    def __init__(self, url: str) -> None:
        """See :class:`tasks.remote.Storage` for what is raised."""
        self.url = url.rstrip("/")
        self._storage = Storage(self.url)

    def has(self, ref: Ref) -> bool:
        """Whether the artifact is there, whole."""
        return self._storage.size(_manifest_name(ref)) is not None

    def push(self, ref: Ref, store: Store) -> bool:
        """Copy an artifact to the mirror; gives whether it was not there.

        Raises:
            CheckpointError: if it is not in the store or streamed, a file is not what its record says, or the storage
                fails.
        """
        if self.has(ref):
            return False
        manifest, folder = store.manifest(ref), store.folder(ref)
        require_files(folder, str(ref))
        files = {f"{_FILES}/{record['sha256']}": folder / name for name, record in manifest.files.items()}
        if problems := store.problems(ref):
            raise CheckpointError(f"{ref}: {problems[0]}. Not mirrored; make it again.")
        with track(f"mirror {ref}", "bytes") as progress:
            self._storage.upload(files, progress)
        self._storage.write(_manifest_name(ref), replace(manifest, location=None).text().encode())
        return True

    def pull(self, ref: Ref, folder: Path) -> Manifest | None:
        """Fetch an artifact's files into a folder; None if the mirror has none.

        Returns:
            Its manifest, with the records of the files as they lie in the folder.

        Raises:
            CheckpointError: if the storage fails, or a file is not what the manifest says.
        """
        content = self._storage.read(_manifest_name(ref))
        if content is None:
            return None
        try:
            manifest = Manifest(**json.loads(content))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{self.url}/{_manifest_name(ref)}: not a manifest ({error}). Remove it.") from error
        # Equal files are fetched once and linked.
        first = {record["sha256"]: name for name, record in reversed(manifest.files.items())}
        with track(f"fetch {ref}", "bytes") as progress:
            self._storage.download({f"{_FILES}/{sha}": name for sha, name in first.items()}, folder, progress)
        for name, record in manifest.files.items():
            path, source = folder / name, folder / first[record["sha256"]]
            if path != source:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
                path.hardlink_to(source)
            if path.stat().st_size != record["size"] or file_sha256(path) != record["sha256"]:
                path.unlink()
                raise CheckpointError(
                    f"{ref}: {name} from {self.url} is not what its manifest says. Run again; if it stays so, remove "
                    f"{_FILES}/{record['sha256']} there and push the artifact again."
                )
        records = {
            name: {**record, "mtime_ns": (folder / name).stat().st_mtime_ns} for name, record in manifest.files.items()
        }
        return replace(manifest, files=records, location=None)


def _manifest_name(ref: Ref) -> str:
    return f"{ref.kind}/{ref.digest}/{MANIFEST}"
