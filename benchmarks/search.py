"""Exact search side by side: nearest neighbours and near-copies, against a plain matrix product and faiss.

usage: python benchmarks/search.py [--sizes 30000 100000] [--dim 512] [--random 50000] [--rounds 3]

Method. Vectors are made up. "clustered": a common mean, one centroid for every 200 vectors, 64 directions of falling
spread around it, and 2% copies with a little noise; "random": no structure at all, the worst case of the bounds. They
lie in a temporary folder, as an array and as the Parquet files that `embed_images` writes (10,000 rows each, zstd).
The engines take turns in one process, single queries and a batch of 1,000; medians of the rounds; k is 10. RSS and
the folder are measured in processes of their own. "product" is a float32 product and argpartition, block by block,
which is not exact at ties. faiss is `IndexFlatIP`; "no copy" its `knn` on the array itself. On a machine that others
use, set OMP_NUM_THREADS=1 and compare processor time. "RSS" is the highest resident memory minus what the process
held with its libraries loaded; it includes the array, where there is one. Near-copies: all pairs with a cosine of at
least 0.97. "brute force" is a product and comparison of every pair once, its processor time extrapolated from a slice
of 500 rows against all; faiss's range_search, which meets every pair twice, from the same 500 queries. "compared" is
the share of all pairs whose projections were multiplied. "checked" says that the pairs of a slice of 500 rows with
all others equal those of brute force. Random vectors are measured at --random and, where that is less than the size,
extrapolated with its square. The rows are written to benchmarks/search.json and benchmarks/search.md.
"""
import argparse, json, platform, statistics, subprocess, sys, tempfile, threading, time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
K, COSINE = 10, .97


def unit(x: np.ndarray) -> np.ndarray:
    "Rows of length 1."
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


def make_vectors(path: Path, n: int, dim: int, kind: str) -> None:
    "Write n vectors, a block at a time."
    rng = np.random.default_rng(0)
    mean, out = unit(rng.normal(size=(1, dim)))[0], np.lib.format.open_memmap(path, "w+", np.float32, (n, dim))
    centroids = rng.normal(size=(max(1, n // 200), dim)).astype(np.float32) / dim ** .5
    directions = (rng.normal(size=(64, dim)) / dim ** .5 * np.arange(1, 65)[:, None] ** -.5).astype(np.float32)
    for s in range(0, n, 16384):
        m = min(16384, n - s)
        noise = rng.standard_normal((m, dim), np.float32) / np.float32(dim ** .5)
        if kind == "random": out[s:s + m] = unit(noise); continue
        spread = rng.standard_normal((m, 64), np.float32) @ directions
        out[s:s + m] = unit(mean + centroids[rng.integers(0, len(centroids), m)] + .5 * spread + .3 * noise)
        if s: out[rng.integers(s, s + m, m // 50)] = unit(out[rng.integers(0, s, m // 50)] + .05 * noise[:m // 50])
    out.flush()


def write_folder(array: Path, folder: Path) -> None:
    "The array as an output folder of `embed_images`."
    import pyarrow as pa, pyarrow.parquet as pq
    x = np.load(array, mmap_mode="r")
    folder.mkdir()
    for s in range(0, len(x), 10_000):
        part, names = x[s:s + 10_000], [f"sku-{i:07}.jpg" for i in range(s, min(len(x), s + 10_000))]
        columns = {"id": names, "path": names, "status": ["embedded"] * len(part),
                   "embedding": pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), x.shape[1])}
        pq.write_table(pa.table(columns).replace_schema_metadata({"devsky_nb.fingerprint": "made-up"}),
                       folder / f"part-{s // 10_000:05}.parquet", compression="zstd")


class Memory:
    "The highest resident memory of this process above what it had at the start, looked at every 5 ms."
    def __init__(self):
        import psutil
        self.process = psutil.Process()
        self.start = self.highest = self.process.memory_info().rss
        self.on = True
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        while self.on: self.highest = max(self.highest, self.process.memory_info().rss); time.sleep(.005)

    def above(self) -> int:
        self.on = False
        return self.highest - self.start


def engines(array: str, names: list[str]) -> dict:  # functions of queries
    "Ways to find neighbours; each holds what it needs."
    import faiss
    from devsky_nb.embedding.search import FolderIndex, VectorIndex
    if names == ["folder"]:
        return {"folder": lambda q, index=FolderIndex(Path(array).with_suffix("")): index.search(q, K)}
    x, made = np.load(array), {}
    if "devsky_nb" in names: made["devsky_nb"] = lambda q, index=VectorIndex(x): index.search(q, K)
    if "faiss" in names:
        (index := faiss.IndexFlatIP(x.shape[1])).add(x)
        made["faiss"] = lambda q: index.search(q, K)
    if "faiss, no copy" in names:
        made["faiss, no copy"] = lambda q: faiss.knn(q, x, K, metric=faiss.METRIC_INNER_PRODUCT)
    if "product" in names: made["product"] = lambda q: by_product(q, x)
    return made


def by_product(q: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # scores, rows; in no order
    "What one writes first."
    best, rows = np.full((len(q), K), -2, np.float32), np.zeros((len(q), K), int)
    for s in range(0, len(x), 4096):
        scores = np.append(best, q @ x[s:s + 4096].T, 1)
        at = np.argpartition(scores, -K, axis=1)[:, -K:]
        rows = np.take_along_axis(np.append(rows, np.broadcast_to(np.arange(s, min(len(x), s + 4096)),
                                                                  (len(q), len(scores[0]) - K)), 1), at, 1)
        best = np.take_along_axis(scores, at, 1)
    return best, rows


def neighbours(array: str, names: str, rounds: str) -> dict:
    "Seconds, processor seconds and answers of some engines, in turn."
    import faiss, pyarrow.parquet, devsky_nb.embedding.search
    x = np.load(array, mmap_mode="r")
    queries, memory = x[::max(1, len(x) // 1000)][:1000].copy(), Memory()
    ask, found, rows = engines(array, names.split(";")), {}, {}
    for _ in range(int(rounds)):
        for n in (1, 1, 1, len(queries)):
            for name, search in ask.items():
                wall, cpu = time.perf_counter(), time.process_time()
                answer = search(queries[:n])
                found.setdefault(name, {}).setdefault(str(n), []).append((time.perf_counter() - wall,
                                                                          time.process_time() - cpu))
                rows[name] = np.sort(answer.rows if hasattr(answer, "rows") else answer[1], 1).tolist()
    return {"rss": memory.above(), "rows": rows,
            "seconds": {name: {n: [statistics.median(t) for t in zip(*times)] for n, times in f.items()} for name,
                        f in found.items()}}


def near_copies(array: str) -> dict:
    "Seconds and memory of all pairs, what brute force and faiss would take, and whether a slice agrees."
    import faiss
    from devsky_nb.embedding import pairs as search
    memory, x = Memory(), np.load(array)
    n, compared, blocks = len(x), 0, search.Clusters.blocks
    def counted(self, i, j, block):
        nonlocal compared
        for part in blocks(self, i, j, block):
            compared += len(part[0]) * len(part[1])
            yield part
    search.Clusters.blocks = counted
    start, cpu = time.perf_counter(), time.process_time()
    pairs = np.concatenate([np.zeros((0, 2), int), *search.similar_pairs(x, COSINE)])
    seconds, cpu, rss = time.perf_counter() - start, time.process_time() - cpu, memory.above()
    slice_ = x[::max(1, n // 500)][:500]
    rows = np.arange(0, n, max(1, n // 500))[:500]
    start, found = time.process_time(), []
    for s in range(0, n, 4096):
        q, r = np.nonzero(slice_ @ x[s:s + 4096].T >= COSINE)
        found += [(min(a, b), max(a, b)) for a, b in zip(rows[q].tolist(), (r + s).tolist()) if a != b]
    brute = (time.process_time() - start) * (n - 1) / 2 / len(rows)
    start = time.process_time()
    (index := faiss.IndexFlatIP(x.shape[1])).add(x)
    built, start = time.process_time() - start, time.process_time()
    index.range_search(slice_, COSINE)
    by_faiss = built + (time.process_time() - start) * n / len(rows)
    mine = set(map(tuple, pairs[np.isin(pairs, rows).any(1)].tolist()))
    return {"n": n, "pairs": len(pairs), "seconds": seconds, "cpu": cpu, "rss": rss,
            "compared": compared / (n * (n - 1) / 2),
            "brute": brute, "faiss": by_faiss,
            "checked": mine == set(found)}


def fresh(*arguments: str) -> dict:
    "One measurement in a process of its own."
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, "--one", *arguments], capture_output=True,
                          text=True)
    if done.returncode: raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: Path, n: int, dim: int, random: int, rounds: int) -> dict:
    "Everything at one size."
    array = folder / f"clustered-{n}.npy"
    make_vectors(array, n, dim, "clustered")
    write_folder(array, array.with_suffix(""))
    names = ["devsky_nb", "product", "faiss", "faiss, no copy"]
    together, alone = fresh("neighbours", str(array), ";".join(names),
                            str(rounds)), {name: fresh("neighbours", str(array), name,
                                                       "1") for name in [*names, "folder"]}
    seconds, rows = together["seconds"] | alone["folder"]["seconds"], together["rows"] | alone["folder"]["rows"]
    found = {name: {"seconds": seconds[name], "rss": alone[name]["rss"],
                    "same": float(np.mean([len(set(a) & set(b)) / K for a, b in zip(rows[name], rows["devsky_nb"])]))}
             for name in alone}
    copies = {"clustered": fresh("near_copies", str(array))}
    array.unlink()
    make_vectors(array := folder / f"random-{n}.npy", min(n, random), dim, "random")
    copies["random"] = fresh("near_copies", str(array))
    array.unlink()
    print(n, json.dumps({"neighbours": found, "near-copies": copies}), file=sys.stderr)
    return {"neighbours": found, "near-copies": copies}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[30_000, 100_000])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--random", type=int, default=50_000, help="most vectors without structure")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: return print(json.dumps(globals()[args.one[0]](*args.one[1:])))
    import faiss, torch
    with tempfile.TemporaryDirectory() as d:
        sizes = {n: measure(Path(d), n, args.dim, args.random, args.rounds) for n in args.sizes}
    result = {"machine": f"{platform.machine()}, {faiss.omp_get_max_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
              "dim": args.dim, "rounds": args.rounds,
              "versions": {"numpy": np.__version__, "faiss": faiss.__version__}, "sizes": sizes}
    (HERE / "search.json").write_text(json.dumps(result, indent=1) + "\n")
    (HERE / "search.md").write_text(table(result), encoding="utf-8")
    print(table(result))


def table(result: dict) -> str:
    "The result as Markdown."
    def milliseconds(times): return f"{1000 * times[0]:,.0f} ({1000 * times[1]:,.0f})"
    lines = ["# Exact search", "",
             f"{result['machine']}; numpy {result['versions']['numpy']}, faiss {result['versions']['faiss']}; vectors of {result['dim']} dimensions; "
             f"rounds: {result['rounds']}. In brackets: processor time.", "",
             "| vectors | neighbours by | one query, ms | 1,000 queries, s | processor, devsky_nb = 1 | RSS, MB | same neighbours |", "|---|---|---|---|---|---|---|"]
    for n, r in result["sizes"].items():
        mine = list(r["neighbours"]["devsky_nb"]["seconds"].values())[-1][1]
        for name, f in r["neighbours"].items():
            one, many = f["seconds"].values()
            lines.append(f"| {int(n):,} | {'devsky_nb, folder' if name == 'folder' else name} | {milliseconds(one)} | {many[0]:,.1f} ({many[1]:,.1f}) | {many[1] / mine:.2f} "
                         f"| {f['rss'] / 1e6:,.0f} | {f['same']:.2%} |")
    lines += ["", "| near-copies among | pairs | s | compared | brute force, processor s | faiss, processor s | times less processor than brute force | RSS, MB | checked |",
              "|---|---|---|---|---|---|---|---|---|"]
    for n, r in result["sizes"].items():
        for kind, c in r["near-copies"].items():
            grow = (int(n) / c["n"]) ** 2
            note = f", from {c['n']:,}" if grow > 1 else ""
            lines.append(f"| {int(n):,} {kind}{note} | {format(c['pairs'], ',') if grow == 1 else '–'} | {grow * c['seconds']:,.0f} ({grow * c['cpu']:,.0f}) | {c['compared']:.1%} | {grow * c['brute']:,.0f} "
                         f"| {grow * c['faiss']:,.0f} | **{c['brute'] / c['cpu']:.1f}** | {c['rss'] / 1e6:,.0f} | {'yes' if c['checked'] else 'NO'} |")
    return "\n".join(lines) + "\n\nMethod: see the head of `search.py`. Run it again with `OMP_NUM_THREADS=1 python benchmarks/search.py --sizes 100000 1000000 --random 100000 --rounds 1`.\n"


if __name__ == "__main__":
    main()
