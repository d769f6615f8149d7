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
        (repo / "refs" / name).write_text(commit, encoding="utf-8")
    return repo


OLD = "01da7e5" + "0" * 33
NEW = "2ead9e1" + "0" * 33


def make_small_repo(cache_dir) -> Path:
    "A repository `shop/clip` of two revisions that share a file; `main` leads to the newer one."
    config = b'{"model_type": "clip"}'
    weights = b"weights" * 1000
    revisions = {OLD: {"config.json": config, "model.safetensors": weights},
                 NEW: {"config.json": config, "model.safetensors": weights[::-1]}}
    return make_repo(cache_dir, "shop/clip", revisions, refs={"main": NEW})


def make_clip_repo(cache_dir, model_folder) -> Path:
    "A repository `shop/fabric-clip` of two revisions of a model that can be loaded; `main` is the newer, `v1` the older."
    content = {p.name: p.read_bytes() for p in Path(model_folder).iterdir() if p.suffix in (".json", ".safetensors")}
    revisions = {OLD: content, NEW: content | {"notes.json": b"{}"}}
    return make_repo(cache_dir, "shop/fabric-clip", revisions, refs={"main": NEW, "v1": OLD})
