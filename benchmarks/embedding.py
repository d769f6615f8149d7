"""Embedding JPEG files with a ViT-B/32 on this machine: the document's code, ours, the peers, and what the machine's
matrix products allow.

usage: python benchmarks/embedding.py [--peers-python PYTHON] [--images 64] [--rounds 3] [--sizes 640x427 1600x1200]

Method. All sides (sides.py) get the same weights (the shape of openai/clip-vit-base-patch32, random, saved once as
the Hub holds it; speed does not depend on their values), the same list of files (scikit-image's photographs, cut and
resized, JPEG at quality 90; in the page cache after the first pass) and batches of 32, and return normalised vectors.
Each side lives in a process of its own, with as many threads as its libraries take by default, and waits for its turn
without work: A B C … A B C …, after a warm-up. Ratios are taken round by round; what is shown is their median, as of
everything else. Processor time comes first: it is what the work costs, and clocks of shared machines lie. "Model only"
is the side's own model call on pixels that it prepared before. Memory is what a process held at most: until it was
ready and warm, and while it embedded. The cosine is the smallest of a side's vectors to plain transformers in fp32. The
limits are the best of several kernels at the model's shapes. Peers run in the environment of --peers-python (peers.txt),
without it in this one; a side that cannot run says why. Nothing is downloaded.

A round during which other programs took more than 5% of the machine is done again; where that does not help, nothing is
written. What was measured until then is kept in a file beside the result, and the same command goes on from there. There
is one result for each kind of processor, in embedding.json, embedding.md and embedding-KIND.png.
"""
import argparse, json, os, platform, statistics, subprocess, sys, tempfile, time
from datetime import date
from pathlib import Path

import numpy as np
import psutil
from sides import BATCH, SIDES, USUAL

HERE = Path(__file__).parent
SET_BY_OTHERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS",
                 "OPENBLAS_NUM_THREADS")  # taken from the sides' environment: they shall decide
CORES = os.cpu_count()
median = statistics.median


def photographs(folder: Path, n: int, size: tuple[int, int]) -> list[str]:
    "`n` JPEG files of `size`, each another part of a photograph, turned a little."
    from PIL import Image
    from skimage import data
    rng, paths = np.random.default_rng(0), []
    bases = [Image.fromarray(f()).convert("RGB") for f in (data.astronaut, data.coffee, data.cat, data.rocket,
                                                           data.hubble_deep_field, data.immunohistochemistry)]
    for i in range(n):
        base = bases[i % len(bases)].rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC)
        w = rng.uniform(.45, .95) * min(base.width, base.height * size[0] / size[1])
        h = w * size[1] / size[0]
        left, top = rng.uniform(0, base.width - w), rng.uniform(0, base.height - h)
        paths.append(str(folder / f"{size[0]}x{size[1]}-{i:04}.jpg"))
        base.resize(size, Image.Resampling.BICUBIC, (left, top, left + w, top + h)).save(paths[-1], quality=90)
    return paths


class SideFailed(Exception): "Why a side has no result."


class Disturbed(Exception): "Other programs took too much of the machine."


class Worker:
    "A side in its process."
    def __init__(self, name: str, python: str, model: Path, work: Path):
        self.name, self.python, self.model, self.log = name, python, model, work / "log"
        self.work, self.idle = work, 0.
        work.mkdir(parents=True)

    def run(self, verb: str, **pipes) -> subprocess.Popen:
        env = {k: v for k, v in os.environ.items() if k not in SET_BY_OTHERS}
        if self.python != sys.executable: env.pop("PYTHONPATH", None)
        return subprocess.Popen([self.python, HERE / "sides.py", verb, self.name, self.model, self.work],
                                stderr=self.log.open("a", encoding="utf-8"), text=True,
                                env=env | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}, **pipes)

    def prepare(self):
        if self.run("prepare", stdout=subprocess.DEVNULL).wait(): raise SideFailed(self.last_words())

    def start(self):
        self.process = self.run("serve", stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ready(self):
        self.about = self.read()
        self.cpu, self.since = self.about.pop("cpu"), time.perf_counter()

    def last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace",
                                                             encoding="utf-8").splitlines() if line.strip()]
        return (lines or ["no message"])[-1][:300]

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if line: return json.loads(line)
        code = self.process.wait()
        raise SideFailed(f"killed by signal {-code}" if code < 0 else self.last_words())

    def ask(self, do: str, **task) -> dict:
        "One task; its CPU time, and how much of it other programs took meanwhile."
        asked, others = time.perf_counter(), busy()
        try: print(json.dumps({"do": do, **task}), file=self.process.stdin, flush=True)
        except BrokenPipeError: pass
        reply = self.read()
        before, after = reply.pop("cpu_before"), reply.pop("cpu_after")
        if asked - self.since > 1: self.idle = max(self.idle, (before - self.cpu) / (asked - self.since))
        reply["others"] = max(0., busy() - others - (after - before)) / (time.perf_counter() - asked)
        self.cpu, self.since = after, time.perf_counter()
        return reply

    def do(self, do: str, **task) -> dict:
        "A task whose failure is the side's."
        reply = self.ask(do, **task)
        if "error" in reply: raise SideFailed(reply["error"])
        return reply

    def close(self):
        if not hasattr(self, "process"): return
        for pipe in (self.process.stdin, self.process.stdout): pipe.close()
        try: self.process.wait(10)
        except subprocess.TimeoutExpired: self.process.kill(); self.process.wait()


def busy() -> float:
    "Seconds that the machine's cores worked for anybody since it started."
    t = psutil.cpu_times()
    return sum(t) - t.idle - getattr(t, "iowait", 0) - getattr(t, "guest", 0) - getattr(t, "guest_nice", 0)


class Turn:
    "The workers that are still in the race, and why the others are not."
    def __init__(self, workers: list[Worker]):
        self.workers, self.failed = {w.name: w for w in workers}, {}

    def each(self, f) -> dict:
        "`f` of every worker, one after the other; a side that fails leaves."
        found = {}
        for name, worker in list(self.workers.items()):
            try: found[name] = f(worker)
            except SideFailed as e: self.failed[name] = str(e); worker.close(); del self.workers[name]
        return found


def rounds(turn: Turn, n: int, f, quiet: float = 1.) -> dict[str, list[dict]]:
    "`n` rounds, every side once in each; one in which others took more than `quiet` of the machine is done again."
    found, disturbed = {}, 0
    for i in range(n):
        while True:
            replies = turn.each(f)
            taken = max((reply["others"] for reply in replies.values()), default=0.) / CORES
            if taken <= quiet: break
            disturbed += 1
            print(f"  other programs took {taken:.0%} of the machine: again", file=sys.stderr)
            if disturbed > n:
                raise Disturbed(f"other programs took {taken:.0%} of the machine, and {quiet:.0%} is the most that a result may have")
        for name, reply in replies.items(): found.setdefault(name, []).append(reply)
        print(f"  round {i + 1} of {n}: " + ", ".join(f"{k} {v['seconds']:.2f} s" for k, v in replies.items()), file=sys.stderr)
    return {name: replies for name, replies in found.items() if name in turn.workers}


def fate(reply: dict, vectors: Path, good: np.ndarray) -> str:
    "What became of a broken file among good ones, from what the side returned."
    if "error" in reply: return f"stops: {reply['error'].split(':')[0]}, no vector for any file"
    found = np.load(vectors)
    if len(found) < len(good): return f"drops it: {len(found)} vectors for {len(good)} files"
    known = np.isfinite(found).all(1)
    if known[~good].any(): return "invents a vector for it"
    return "reports it, keeps the others" if known[good].all() else f"reports it, loses {int((~known[good]).sum())} others"


def cosines(vectors: np.ndarray, reference: np.ndarray) -> float:
    if vectors.shape != reference.shape:
        raise SideFailed(f"vectors of shape {vectors.shape}, expected {reference.shape}")
    if not np.isfinite(vectors).all():
        raise SideFailed(f"{int((~np.isfinite(vectors).all(1)).sum())} good files have no vector")
    return float((vectors * reference).sum(1).min())


class Kept:
    "What an earlier run with the same arguments measured, phase by phase."
    def __init__(self, path: Path, key: list):
        self.path, self.key, self.phases = path, json.loads(json.dumps(key)), {}
        try: found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError): return
        if found["key"] == self.key: self.phases = found["phases"]

    def keep(self, phase: str, data: dict):
        self.phases[phase] = data
        self.path.write_text(json.dumps({"key": self.key, "phases": self.phases}), encoding="utf-8")


def measure(model: Path, work: Path, args, kept: Kept) -> dict:
    "Everything, as plain data."
    def python(side): return args.peers_python if side.peer and args.peers_python else sys.executable
    def worker(name, python): return Worker(name, python, model, Path(tempfile.mkdtemp(dir=work)) / "side")
    chosen = [worker(name, python(side)) for name, (side, _) in SIDES.items() if name in args.sides]
    limits = [worker("limits", p) for p in dict.fromkeys([sys.executable, args.peers_python or sys.executable])]
    try: return measure_sides(model, work, args, kept, chosen, limits)
    finally:
        for w in (*chosen, *limits): w.close()


def measure_sides(model: Path, work: Path, args, kept: Kept, chosen: list[Worker], limits: list[Worker]) -> dict:
    files = {size: photographs(work, args.images, tuple(map(int, size.split("x")))) for size in args.sizes}
    truth, sizes = references(model, work, files)
    turn = Turn(chosen)
    turn.each(Worker.prepare)
    turn.each(Worker.start); turn.each(Worker.ready)
    result = {name: {"about": w.about | {"environment": "peers" if w.python != sys.executable else "this"},
                     "end_to_end": {}, "min_cosine": {}, "peak": {}} for name, w in turn.workers.items()}

    def size_phase(size, paths):
        found = {name: {"peak": {}} for name in turn.workers}
        def warm(w):
            w.do("files", paths=paths, save=str(vectors := w.work / "vectors.npy"))
            found[w.name]["min_cosine"] = cosines(np.load(vectors), truth[size][w.about["vectors_are"]])
            found[w.name]["peak"]["until_warm"] = w.do("peak")["peak"]
        turn.each(warm)
        for name, replies in rounds(turn, args.rounds, lambda w: w.do("files", paths=paths), args.others).items():
            found[name]["end_to_end"] = replies
        for name, reply in turn.each(lambda w: w.do("peak")).items(): found[name]["peak"][size] = reply["peak"]
        return {name: found[name] for name in turn.workers}

    for size, paths in files.items():
        print(size, file=sys.stderr)
        if size not in kept.phases: kept.keep(size, size_phase(size, paths))
        for name, found in kept.phases[size].items():
            if name not in result: continue
            result[name]["end_to_end"][size], result[name]["min_cosine"][size] = found["end_to_end"], found["min_cosine"]
            result[name]["peak"] = found["peak"] | result[name]["peak"]

    cut = work / "cut.jpg"
    some = files[args.sizes[0]][:8]
    cut.write_bytes(Path(some[0]).read_bytes()[:os.path.getsize(some[0]) // 2])
    planted, good = [*some[:len(some) // 2], str(cut), *some[len(some) // 2:]], np.arange(len(some) + 1) != len(some) // 2
    def broken(w): return fate(w.ask("files", paths=planted, save=str(w.work / "broken.npy")), w.work / "broken.npy", good)
    for name, what in turn.each(broken).items(): result[name]["broken_file"] = what

    print("model only", file=sys.stderr)
    if "model" not in kept.phases:
        turn.each(lambda w: w.do("prepared", paths=files[args.sizes[-1]]) and w.do("model"))
        gemm = Turn([]); gemm.workers = dict(enumerate(limits))
        gemm.each(Worker.start); gemm.each(Worker.ready)
        found = {"sides": {}, "limits": []}
        for _ in range(args.rounds):
            for name, replies in rounds(turn, 1, lambda w: w.do("model"), args.others).items(): found["sides"].setdefault(name, []).extend(replies)
            for k, replies in rounds(gemm, 1, lambda w: w.do("measure"), args.others).items(): found["limits"].append([k, replies[0]])
        found |= {"left_out": [w.about["left_out"] for w in gemm.workers.values()], "failed": list(gemm.failed.values())}
        kept.keep("model", found)
    model_only = kept.phases["model"]
    for name in turn.workers:
        result[name]["model"] = model_only["sides"].get(name, [])
        result[name]["idle"] = turn.workers[name].idle
    by_environment = {}
    for k, reply in model_only["limits"]: by_environment.setdefault(k, []).append(reply)
    machine = {"limits": list(by_environment.values()), "left_out": model_only["left_out"], "failed": model_only["failed"]}
    return {"sizes": sizes, "sides": result, "failed": turn.failed, "machine": machine}


def references(model: Path, work: Path, files: dict) -> tuple[dict, dict]:
    "The vectors that all are compared with, and what the files are like."
    dim = json.loads((model / "config.json").read_text(encoding="utf-8"))["projection_dim"]
    truth, sizes = {}, {}
    reference = Worker("reference", sys.executable, model, Path(tempfile.mkdtemp(dir=work)) / "side")
    reference.start(); reference.ready()
    for size, paths in files.items():
        reference.do("files", paths=paths, save=str(work / "truth.npy"))
        truth[size] = dict(zip(("projected", "cls"), np.split(np.load(work / "truth.npy"), [dim], axis=1)))
        between = (truth[size]["projected"] @ truth[size]["projected"].T)[np.triu_indices(len(paths), 1)]
        sizes[size] = {"kilobytes": round(median(os.path.getsize(p) for p in paths) / 1000),
                       "cosine_between_images": float(np.median(between))}
    reference.close()
    return truth, sizes


def spread(values: list[float], digits: int = 2) -> dict:
    return {"median": round(median(values), digits), "min": round(min(values), digits),
            "max": round(max(values), digits)}


def best_of(found: list[list[dict]], kind: str) -> list[dict]:
    "The limit of every round: the best that any environment reached in it."
    return [max(per_round, key=lambda x: x["images_per_second"]) for per_round in
            ([reply["limits"][kind] for reply in replies if kind in reply["limits"]] for replies in zip(*found)) if per_round]


def precision_of(name: str) -> str:
    "What a side computes in."
    return "int8" if "int8" in name or "auto" in name else "fp32"


def ratios(of: list[dict], to: list[dict], what: str) -> dict:
    "How many times as much `to` took as `of`, round by round."
    return spread([b[what] / a[what] for a, b in zip(of, to)])


def summary(raw: dict, n: int) -> dict:
    "Milliseconds of processor time and images per second, ratios round by round and shares, from the seconds."
    sides = {}
    limit = {kind: best_of(raw["machine"]["limits"], kind) for kind in ("fp32", "int8")}
    whole = {name: side for name, side in raw["sides"].items() if name not in raw["failed"]}
    for name, side in whole.items():
        e2e = side["end_to_end"]
        sides[name] = {"precision": precision_of(name),
                       "cpu_ms": {size: spread([1000 * r["cpu"] / n for r in replies], 1) for size, replies in e2e.items()},
                       "images_per_second": {size: spread([n / r["seconds"] for r in replies]) for size, replies in e2e.items()},
                       "model_only": spread([n / r["seconds"] for r in side["model"]]),
                       "model_cpu_ms": spread([1000 * r["cpu"] / n for r in side["model"]], 1),
                       "share_of_limit": {kind: spread([n / r["seconds"] / lim["images_per_second"]
                                                        for r, lim in zip(side["model"], limit[kind])], 3) for kind in limit if limit[kind]},
                       "peak_mib": {phase: value and round(value / 2**20) for phase, value in side["peak"].items()},
                       "min_cosine": side["min_cosine"], "broken_file": side["broken_file"],
                       "idle_cores": round(side["idle"], 3), **side["about"]}
    best = {}
    for precision in ("fp32", "int8"):
        peers = [name for name in sides if name in SIDES and SIDES[name][0].peer and precision_of(name) == precision]
        if peers: best[precision] = {size: min(peers, key=lambda p: sides[p]["cpu_ms"][size]["median"]) for size in raw["sizes"]}
    to = {"document": {size: "document" for size in raw["sizes"]} if "document" in sides else {}, **best}
    for name in sides:
        for what in ("cpu", "seconds"):
            sides[name][f"{what}_ratio"] = {other: {size: ratios(whole[name]["end_to_end"][size], whole[them]["end_to_end"][size], what)
                                                    for size, them in names.items()} for other, names in to.items()}
    others = [r["others"] for side in whole.values() for replies in side["end_to_end"].values() for r in replies]
    return {"sizes": raw["sizes"], "sides": sides, "no_result": raw["failed"], "best_peer": best,
            "limits": {kind: {**spread([x["images_per_second"] for x in found], 1), "shapes": found[-1]["shapes"]}
                       for kind, found in limit.items() if found},
            "limits_left_out": raw["machine"]["left_out"], "other_programs_cores": spread(others) if others else None,
            "idle_sides_cores": max((s["idle_cores"] for s in sides.values()), default=None)}


def number(x: dict, digits: int = 1) -> str: return f"{x['median']:.{digits}f} ({x['min']:.{digits}f}–{x['max']:.{digits}f})"
def times(x: dict | None) -> str: return f"{x['median']:.2f} ({x['min']:.2f}–{x['max']:.2f})" if x else "–"
def share(x: float) -> str: return f"{100 * x:.0f}%"


def table(results: dict[str, dict]) -> str:
    "The results as a page."
    page = ["# Embedding JPEG files with a ViT-B/32", "",
            "One result for each kind of processor. Processor time first: it is what the work costs. × is how many times as much the side in the heading "
            "takes, round by round, median (lowest–highest)."]
    for kind, r in results.items(): page += ["", *section(kind, r)]
    return "\n".join([*page, "", "Method: see the heads of `embedding.py` and `sides.py`. Run it again with `make bench`.", ""])


def section(kind: str, r: dict) -> list[str]:
    "One result."
    s, sizes = r["sides"], list(r["sizes"])
    names = {"document": "document", **{precision: "/".join(dict.fromkeys(best.values())) for precision, best in r["best_peer"].items()}}
    page = [f"## {KINDS[kind]}", "",
            f"{r['machine']}; {r['date']}. Weights: {r['weights']}. {r['images']} files of each size, batches of {BATCH}, {r['rounds']} rounds." + r.get("note", "")]
    for title, field, ratio in (("Processor time, milliseconds per image, from files", "cpu_ms", "cpu_ratio"),
                                ("The clock, images per second, from files", "images_per_second", "seconds_ratio")):
        head = [c for size in sizes for c in (size, *(f"× {name}" for name in names.values()))]
        page += ["", f"### {title}", "", "| | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
        for name, side in s.items():
            cells = [c for size in sizes for c in (number(side[field][size]), *(times(side[ratio].get(other, {}).get(size)) for other in names))]
            page.append(f"| {name} | " + " | ".join(cells) + " |")
        page += [f"| {name} | no result: {why} |" + " |" * (len(head) - 1) for name, why in r["no_result"].items()]
    page += ["", f"![Images per second of processor time, every side](embedding-{kind}.png)", "", "### Model, memory, vectors", "",
             "| | model only, CPU ms per image | images per second | of the fp32 limit | of the int8 limit | peak memory MiB, until warm / embedding | "
             "smallest cosine | a broken file |", "|---" * 8 + "|"]
    for name, side in s.items():
        peak = [side["peak_mib"]["until_warm"], max((side["peak_mib"][size] or 0 for size in sizes), default=0)]
        of = [share(side["share_of_limit"][kind]["median"]) if kind in side["share_of_limit"] else "–" for kind in ("fp32", "int8")]
        page.append(f"| {name} | {number(side['model_cpu_ms'])} | {number(side['model_only'])} | {of[0]} | {of[1]} | {' / '.join(str(p or '–') for p in peak)} | "
                    f"{min(side['min_cosine'].values()):.6f}{' †' * (side['vectors_are'] == 'cls')} | {side['broken_file']} |")
    if any(side["vectors_are"] == "cls" for side in s.values()):
        page += ["", "† to the CLS token of plain transformers, which is what this side takes; all others to the projected vector."]
    return page + ["", "### How to read it", "", *reading(r), "", "### The sides", "",
                   *(f"- **{name}**: {side['pixels']}. Threads: {side['threads']}. {', '.join(f'{k} {v}' for k, v in side['packages'].items())}; "
                     f"{side['environment']} environment." for name, side in s.items())]


def reading(r: dict) -> list[str]:
    "What the numbers say; every sentence is computed from them."
    s, lines = r["sides"], []
    for kind, x in r["limits"].items():
        speeds = ", ".join(f"{shape} {d['gops']:.0f} ({d['kernel'].split(maxsplit=1)[1]})" for shape,
                           d in x["shapes"].items())
        lines.append(f"- **The {kind} limit** is {number(x)} images per second: what the matrix products of the model would take by themselves. In 10⁹ operations a second: {speeds}.")
    for kind in ("fp32", "int8"):
        if kind not in r["limits"]: lines.append(f"- **The {kind} limit** could not be measured here.")
    for size in r["sizes"]:
        kept = ", ".join(f"{name} {1000 * CORES / side['cpu_ms'][size]['median']:.1f}" for name, side in s.items())
        if kept: lines.append(f"- **At {size}, were all {CORES} cores always busy** with the same work, images per second would be: {kept}. No way of overlapping reading and model exceeds that.")
    apart = max(1 - x["cosine_between_images"] for x in r["sizes"].values())
    worst = {name: 1 - min(side["min_cosine"].values()) for name, side in s.items()}
    if worst:
        lines.append(f"- **Cosines.** With these weights two different images are {apart:.3f} apart (1 − cosine, median). The vectors are off by at most " +
                           ", ".join(f"{max(0, off):.1e} ({name})" for name, off in worst.items()) + "." +
                           (" The weights are random: trained ones have outliers that these have not, and what int8 does to them has to be tried on them." if r["weights"] == "random" else ""))
    builds = {side["packages"]["torch"]: side["environment"] for side in s.values() if "torch" in side["packages"]}
    if len(builds) > 1:
        lines.append("- **Memory.** The environments hold different builds of torch (" + ", ".join(f"{v} in {k}" for v,
                                                                                                   k in builds.items()) + "), and a build's own size is part of a process.")
    files = ", ".join(f"{size} with {x['kilobytes']} kB" for size, x in r["sizes"].items())
    lines.append(f"- **Files.** {files} in the median, all in the page cache: no disk and no network is measured.")
    if r["other_programs_cores"]:
        noise = r["other_programs_cores"]
        lines.append(f"- **Noise.** While a side worked, other programs took {noise['median']:.2f} of {CORES} cores in the median and {noise['max']:.2f} at most; a side that waited took at most "
                     f"{r['idle_sides_cores']:.3f}.")
    return lines


def plot(r: dict, path: Path):
    "Bars end to end, a mark for the model alone, both by processor time."
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    names, sizes = list(r["sides"])[::-1], list(r["sizes"])
    fig, ax = plt.subplots(figsize=(9, 1.6 + .62 * len(names)), layout="constrained")
    height, colours = .8 / len(sizes), ("#56B4E9", "#0072B2", "#009E73", "#CC79A7")
    for i, size in enumerate(sizes):
        ms = [r["sides"][name]["cpu_ms"][size] for name in names]
        y = [k + .4 - (i + .5) * height for k in range(len(names))]
        per_second = [1000 / v["median"] for v in ms]
        ax.barh(y, per_second, height, color=colours[i % 4], label=f"from files, {size}")
        for v, at in zip(per_second, y): ax.text(v, at, f"  {v:.1f}", va="center", fontsize=8)
    ax.plot([1000 / r["sides"][name]["model_cpu_ms"]["median"] for name in names], range(len(names)), "D", color="#D55E00",
            markersize=6, markeredgecolor="white", label="model only")
    ax.set(yticks=range(len(names)), yticklabels=names, xlabel="images per second of processor time", title="Embedding JPEG files with a ViT-B/32")
    ax.set_xlim(left=0)
    ax.spines[["top", "right"]].set_visible(False)
    fig.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    fig.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(fig)


KINDS = {"amx": "Processors with AMX", "vnni": "Processors with VNNI", "avx2": "Processors with AVX2 only", "arm": "arm"}


def flags() -> list[str]:
    "The instructions that matter for matrix products, of those that this processor has."
    try: text = Path("/proc/cpuinfo").read_text()
    except OSError: return []
    found = next((line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith(("flags", "Features"))), [])
    return [f for f in ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm") if f in found]


def kind_of(instructions: list[str], machine: str) -> str:
    "Which kind of processor this is: key of `KINDS`."
    if machine in ("arm64", "aarch64"): return "arm"
    if "amx_int8" in instructions: return "amx"
    return "vnni" if {"avx_vnni", "avx512_vnni"} & set(instructions) else "avx2"


def processor() -> str:
    "Name of the processor and what it can do."
    try: text = Path("/proc/cpuinfo").read_text()
    except OSError: text = ""
    name = next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), platform.processor() or platform.machine())
    return f"{name}, {CORES} cores, {' '.join(flags())}"


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers-python", metavar="PYTHON",
                        help="the interpreter of an environment with benchmarks/peers.txt")
    parser.add_argument("--images", type=int, default=64, help="files of each size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", default=["640x427", "1600x1200"])
    parser.add_argument("--sides", nargs="+", default=list(USUAL), choices=list(SIDES), metavar="SIDE", help=", ".join(SIDES))
    parser.add_argument("--model", type=Path, help="a CLIP folder to use instead of random weights")
    parser.add_argument("--others", type=float, default=.05, help="the share of the machine that other programs may take")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args(argv)
    kind = kind_of(flags(), platform.machine())
    weights = "random" if args.model is None else args.model.name
    kept = Kept(args.out / f"embedding-{kind}.part.json", [kind, weights, args.images, args.rounds, args.sides, date.today().isoformat()])
    with tempfile.TemporaryDirectory(prefix="embedding-") as d:
        work, model = Path(d), args.model
        if model is None:
            model = work / "model"
            subprocess.run([sys.executable, HERE / "sides.py", "model", "-", model, work], check=True, stdout=subprocess.DEVNULL)
        try: raw = measure(model, work, args, kept)
        except Disturbed as e:
            sys.exit(f"nothing is written: {e}. What was measured before ({', '.join(kept.phases) or 'nothing'}) is kept: run the same command again")
    result = {"machine": processor(), "date": date.today().isoformat(), "images": args.images, "rounds": args.rounds, "weights": weights,
              **summary(raw, args.images), "raw": raw}
    path = args.out / "embedding.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results = {k: result if k == kind else results[k] for k in KINDS if k == kind or k in results}
    path.write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "embedding.md").write_text(page := table(results), encoding="utf-8")
    plot(result, args.out / f"embedding-{kind}.png")
    kept.path.unlink(missing_ok=True)
    print(page)
    return result


if __name__ == "__main__":
    main()
