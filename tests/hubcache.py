"Real local repositories in the Hub's cache layout, for lessons and tests that must not need a network."
import hashlib, os
from pathlib import Path


def blob_name(name: str, data: bytes) -> str:
    "The file name that the Hub's client gives a blob: sha256 for large files (LFS), git's sha1 for the others."
    if name.endswith((".safetensors", ".bin")): return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def make_repo(cache_dir, repo_id: str, revisions: dict[str, dict[str, bytes]], refs: dict[str, str] = {}) -> Path:
    "Write `revisions` (commit -> file name -> content) and `refs` (name -> commit); equal contents share a blob."
    repo = Path(cache_dir) / ("models--" + repo_id.replace("/", "--"))
    for commit, files in revisions.items():
        for name, data in files.items():
            blob, link = repo / "blobs" / blob_name(name, data), repo / "snapshots" / commit / name
            blob.parent.mkdir(parents=True, exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(data)
            link.symlink_to(os.path.relpath(blob, link.parent))
    for name, commit in refs.items():
        (repo / "refs" / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / "refs" / name).write_text(commit)
    return repo
