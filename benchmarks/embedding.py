"""Embedding JPEG files with a ViT-B/32 on this machine: the document's code, ours, the peers, and what the machine's
matrix products allow.

usage: python benchmarks/embedding.py [--peers-python PYTHON] [--images 64] [--rounds 5] [--sizes 640x427 1600x1200]

Method. All sides (sides.py) get the same weights (the shape of openai/clip-vit-base-patch32, random, saved once as
the Hub holds it; speed does not depend on their values), the same list of files (scikit-image's photographs, cut and
resized, JPEG at quality 90; in the page cache after the first pass) and batches of 32, and return normalised vectors.
Each side lives in a process of its own, with as many threads as its libraries take by default, and waits for its turn
without work: A B C … A B C …, after a warm-up. Ratios are taken round by round; what is shown is their median, as of
everything else. "Model only" is the side's own model call on pixels that it prepared before. Memory is what a process
held at most: until it was ready and warm, and while it embedded. The cosine is the smallest of a side's vectors to
plain transformers in fp32. The limits are the best of several kernels at the model's shapes. "Auto" tries its
backends on these very files before it is warm; what the trial took and chose is told, and is no part of the speeds.
Peers run in the environment of --peers-python (peers.txt), without it in this one; a side that cannot run says why.
Nothing is downloaded. The result goes to embedding.json, embedding.md and embedding.png.
"""
import argparse, json, os, platform, shutil, statistics, subprocess, sys, tempfile, time
from datetime import date
from pathlib import Path

import numpy as np
import psutil
from sides import BATCH, HELPERS, SIDES

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


def rounds(turn: Turn, n: int, f) -> dict[str, list[dict]]:
    "`n` rounds, every side once in each."
    found = {}
    for i in range(n):
        for name, reply in turn.each(f).items(): found.setdefault(name, []).append(reply)
        print(f"  round {i + 1} of {n}: " + ", ".join(f"{k} {v[-1]['seconds']:.2f} s" for k, v in found.items()),
              file=sys.stderr)
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


def measure(model: Path, work: Path, args) -> dict:
    "Everything, as plain data."
    def python(side): return args.peers_python if side.peer and args.peers_python else sys.executable
    def worker(name, python): return Worker(name, python, model, Path(tempfile.mkdtemp(dir=work)) / "side")
    chosen = [worker(name, python(side)) for name, (side, _) in SIDES.items() if name in args.sides]
    limits = [worker("limits", p) for p in dict.fromkeys([sys.executable, args.peers_python or sys.executable])]
    reference = worker("reference", sys.executable)
    files = {size: photographs(work, args.images, tuple(map(int, size.split("x")))) for size in args.sizes}
    dim = json.loads((model / "config.json").read_text(encoding="utf-8"))["projection_dim"]
    truth, sizes = {}, {}
    reference.start(); reference.ready()
    for size, paths in files.items():
        reference.do("files", paths=paths, save=str(work / "truth.npy"))
        truth[size] = dict(zip(("projected", "cls"), np.split(np.load(work / "truth.npy"), [dim], axis=1)))
        between = (truth[size]["projected"] @ truth[size]["projected"].T)[np.triu_indices(len(paths), 1)]
        sizes[size] = {"kilobytes": round(median(os.path.getsize(p) for p in paths) / 1000),
                       "cosine_between_images": float(np.median(between))}
    reference.close()

    turn = Turn(chosen)
    turn.each(Worker.prepare)
    turn.each(Worker.start); turn.each(Worker.ready)
    result = {name: {"about": w.about | {"environment": "peers" if w.python != sys.executable else "this"},
                     "end_to_end": {},
                     "min_cosine": {}, "setup": {}, "peak": {}}
              for name, w in turn.workers.items()}

    for size, paths in files.items():
        print(size, file=sys.stderr)
        def warm(w):
            reply = w.do("setup", paths=paths)
            if reply["setup"]:
                result[w.name]["setup"][size] = {"seconds": reply["seconds"], "receipt": reply["setup"]}
            w.do("files", paths=paths, save=str(vectors := w.work / "vectors.npy"))
            result[w.name]["min_cosine"][size] = cosines(np.load(vectors), truth[size][w.about["vectors_are"]])
            result[w.name]["peak"].setdefault("until_warm", w.do("peak")["peak"])
        turn.each(warm)
        for name, replies in rounds(turn, args.rounds, lambda w: w.do("files", paths=paths)).items():
            result[name]["end_to_end"][size] = replies
        for name, reply in turn.each(lambda w: w.do("peak")).items(): result[name]["peak"][size] = reply["peak"]

    cut = work / "cut.jpg"
    some = files[args.sizes[0]][:8]
    cut.write_bytes(Path(some[0]).read_bytes()[:os.path.getsize(some[0]) // 2])
    planted, good = [*some[:len(some) // 2], str(cut),
                     *some[len(some) // 2:]], np.arange(len(some) + 1) != len(some) // 2
    def broken(w): return fate(w.ask("files", paths=planted, save=str(w.work / "broken.npy")), w.work / "broken.npy",
                               good)
    for name, what in turn.each(broken).items(): result[name]["broken_file"] = what

    print("model only", file=sys.stderr)
    turn.each(lambda w: w.do("prepared", paths=files[args.sizes[-1]]) and w.do("model"))
    gemm = Turn([]); gemm.workers = dict(enumerate(limits))
    gemm.each(Worker.start); gemm.each(Worker.ready)
    found = {name: [] for name in turn.workers}
    for _ in range(args.rounds):
        for name, reply in turn.each(lambda w: w.do("model")).items(): found[name].append(reply)
        for name, reply in gemm.each(lambda w: w.do("measure")).items(): found.setdefault(name, []).append(reply)
    for name in turn.workers: result[name]["model"] = found[name]
    machine = {"limits": [found[k] for k in gemm.workers],
               "left_out": [w.about["left_out"] for w in gemm.workers.values()],
               "failed": list(gemm.failed.values())}
    for name, w in turn.workers.items(): result[name]["idle"] = w.idle
    for w in (*chosen, *limits): w.close()
    return {"sizes": sizes, "sides": result, "failed": turn.failed, "machine": machine}


def spread(values: list[float], digits: int = 2) -> dict:
    return {"median": round(median(values), digits), "min": round(min(values), digits),
            "max": round(max(values), digits)}


def best_of(found: list[list[dict]], kind: str) -> list[dict]:
    "The limit of every round: the best that any environment reached in it."
    return [max(per_round, key=lambda x: x["images_per_second"]) for per_round in
            ([reply["limits"][kind] for reply in replies if kind in reply["limits"]] for replies in zip(*found)) if per_round]


def summary(raw: dict, n: int) -> dict:
    "Images per second, ratios round by round and shares, from the seconds."
    sides = {}
    limit = {kind: best_of(raw["machine"]["limits"], kind) for kind in ("fp32", "int8")}
    whole = {name: side for name, side in raw["sides"].items() if name not in raw["failed"]}
    for name, side in whole.items():
        ms = {size: spread([1000 * r["cpu"] / n for r in replies], 1) for size, replies in side["end_to_end"].items()}
        sides[name] = {"images_per_second": {size: spread([n / r["seconds"] for r in replies]) for size,
                                             replies in side["end_to_end"].items()}, "cpu_ms": ms,
                       "model_only": spread([n / r["seconds"] for r in side["model"]]),
                       "share_of_limit": {kind: spread([n / r["seconds"] / lim["images_per_second"] for r,
                                                        lim in zip(side["model"], limit[kind])],
                                                        3) for kind in limit if limit[kind]},
                       "peak_mib": {phase: value and round(value / 2**20) for phase, value in side["peak"].items()},
                       "min_cosine": side["min_cosine"],
                       "broken_file": side["broken_file"], "setup": side["setup"],
                       "idle_cores": round(side["idle"], 3),
                       **side["about"]}
    peers = [name for name in sides if SIDES[name][0].peer]
    best_peer = {size: max(peers, key=lambda p: sides[p]["images_per_second"][size]["median"]) for size in raw["sizes"] if peers}
    for name in sides:
        for label, others in (("ratio_to_document",
                               {size: "document" for size in raw["sizes"] if "document" in sides}),
                              ("ratio_to_best_peer", best_peer)):
            sides[name][label] = {size: spread([a["seconds"] / b["seconds"] for a,
                                                b in zip(whole[other]["end_to_end"][size],
                                                         whole[name]["end_to_end"][size])])
                                  for size, other in others.items()}
    others = [r["others"] for side in whole.values() for replies in side["end_to_end"].values() for r in replies]
    return {"sizes": raw["sizes"], "sides": sides, "no_result": raw["failed"], "best_peer": best_peer,
            "limits": {kind: {**spread([x["images_per_second"] for x in found], 1),
                              "shapes": found[-1]["shapes"]} for kind,
                       found in limit.items() if found},
            "limits_left_out": raw["machine"]["left_out"], "other_programs_cores": spread(others) if others else None,
            "idle_sides_cores": max((s["idle_cores"] for s in sides.values()), default=None)}


def number(x: dict, digits: int = 1) -> str: return f"{x['median']:.{digits}f} ({x['min']:.{digits}f}–{x['max']:.{digits}f})"
def times(x: dict | None) -> str: return f"{x['median']:.2f} ({x['min']:.2f}–{x['max']:.2f})" if x else "–"
def share(x: float) -> str: return f"{100 * x:.0f}%"


def table(r: dict) -> str:
    "The result as a page."
    s, sizes = r["sides"], list(r["sizes"])
    page = ["# Embedding JPEG files with a ViT-B/32", "",
            f"{r['machine']}; {r['date']}. Weights: {r['weights']}. {r['images']} files of each size, batches of {BATCH}, {r['rounds']} rounds. "
            "Images per second, median (lowest–highest of the rounds); × is against the side in the heading, round by round.", ""]
    head = [c for size in sizes for c in (size, "× document", f"× {r['best_peer'].get(size, 'best peer')}")]
    page += ["## End to end, from files", "", "| | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for name, side in s.items():
        cells = [c for size in sizes for c in (number(side["images_per_second"][size]),
                                               times(side["ratio_to_document"].get(size)),
                                               times(side["ratio_to_best_peer"].get(size)))]
        page.append(f"| {name} | " + " | ".join(cells) + " |")
    page += [f"| {name} | no result: {why} |" + " |" * (len(head) - 1) for name, why in r["no_result"].items()]
    page += ["", "![Images per second of every side](embedding.png)", "", "## Model, processor time, memory, vectors",
             "",
             "| | model only | of the fp32 limit | of the int8 limit | CPU ms per image, " + " / ".join(sizes) + " | peak memory MiB, until warm / embedding | smallest cosine | a broken file |", "|---" * 8 + "|"]
    for name, side in s.items():
        peak = [side["peak_mib"]["until_warm"], max((side["peak_mib"][size] or 0 for size in sizes), default=0)]
        of = [share(side["share_of_limit"][kind]["median"]) if kind in side["share_of_limit"] else "–" for kind in ("fp32", "int8")]
        page.append(f"| {name} | {number(side['model_only'])} | {of[0]} | {of[1]} | {' / '.join(str(round(side['cpu_ms'][size]['median'])) for size in sizes)} | "
                    f"{' / '.join(str(p or '–') for p in peak)} | {min(side['min_cosine'].values()):.6f}{' †' * (side['vectors_are'] == 'cls')} | {side['broken_file']} |")
    if any(side["vectors_are"] == "cls" for side in s.values()):
        page += ["", "† to the CLS token of plain transformers, which is what this side takes; all others to the projected vector."]
    page += ["", "## How to read it", "", *reading(r), "", "## The sides", "",
             *(f"- **{name}**: {side['pixels']}. Threads: {side['threads']}. {', '.join(f'{k} {v}' for k, v in side['packages'].items())}; {side['environment']} environment."
               + "".join(f" {size}: {receipt_line(x)}." for size, x in side["setup"].items()) for name,
               side in s.items())]
    return "\n".join([*page, "",
                      "Method: see the heads of `embedding.py` and `sides.py`. Run it again with `make bench`.", ""])


def receipt_line(setup: dict) -> str:
    "What a side settled on before the job."
    receipt = setup["receipt"]
    scaled = f", JPEGs decoded smaller (at least {receipt['min_edge']} pixels)" if receipt["min_edge"] else ""
    return f"its trial took {setup['seconds']:.0f} s and chose {receipt['backend']}{scaled}: {receipt['reason']}"


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
        reached = {name: side["images_per_second"][size]["median"] / side["model_only"]["median"] for name,
                   side in s.items()}
        for says, low, high in (("more", 0, .5), ("less", .5, .9), ("next to nothing beside", .9, float("inf"))):
            names = [f"{name} ({share(x)})" for name, x in reached.items() if low <= x < high]
            if names:
                lines.append(f"- **At {size}** reading the images costs {says}{' than' * (high < 1)} the model, by what is left of the model's own speed, for {', '.join(names)}.")
        kept = ", ".join(f"{name} {1000 * CORES / side['cpu_ms'][size]['median']:.1f}" for name, side in s.items())
        if kept:
            lines.append(f"- **At {size}, were all {CORES} cores always busy** with the same work, images per second would be: {kept}. No way of overlapping reading and model exceeds that.")
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
                     f"{r['idle_sides_cores']:.3f}." + (" That is not a quiet machine: trust the ratios before the speeds." if noise["median"] > .1 else ""))
    return lines


def plot(r: dict, path: Path):
    "Bars end to end, a mark for the model alone, lines for the limits."
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    names, sizes = list(r["sides"])[::-1], list(r["sizes"])
    fig, ax = plt.subplots(figsize=(9, 1.6 + .62 * len(names)), layout="constrained")
    height, colours = .8 / len(sizes), ("#56B4E9", "#0072B2", "#009E73", "#CC79A7")
    for i, size in enumerate(sizes):
        x = [r["sides"][name]["images_per_second"][size] for name in names]
        y = [k + .4 - (i + .5) * height for k in range(len(names))]
        ax.barh(y, [v["median"] for v in x], height, color=colours[i % 4], label=f"from files, {size}",
                xerr=[[v["median"] - v["min"] for v in x], [v["max"] - v["median"] for v in x]],
                error_kw={"elinewidth": 1, "ecolor": "#333333"})
        for v, at in zip(x, y):
            ax.text(v["max"], at, f"  {v['median']:.1f}", va="center", fontsize=8,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": .5, "alpha": .8})
    ax.plot([r["sides"][name]["model_only"]["median"] for name in names], range(len(names)), "D", color="#D55E00",
            markersize=6,
            markeredgecolor="white", label="model only")
    for (kind, x), style in zip(r["limits"].items(), ("--", ":")):
        ax.axvline(x["median"], color="black", linestyle=style, linewidth=1.2, label=f"{kind} limit of the machine")
    ax.set(yticks=range(len(names)), yticklabels=names, xlabel="images per second",
           title="Embedding JPEG files with a ViT-B/32")
    ax.set_xlim(left=0)
    ax.spines[["top", "right"]].set_visible(False)
    fig.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    fig.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(fig)


def processor() -> str:
    "Name of the processor and the instructions that matter for matrix products."
    try: text = Path("/proc/cpuinfo").read_text()
    except OSError: return f"{platform.processor() or platform.machine()}, {CORES} cores"
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {k.strip(): v.strip() for k, v in fields.items()}
    flags = [f for f in ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16",
                         "amx_int8") if f in fields.get("flags", "").split()]
    return f"{fields.get('model name', platform.machine())}, {CORES} cores, {' '.join(flags)}"


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers-python", metavar="PYTHON",
                        help="the interpreter of an environment with benchmarks/peers.txt")
    parser.add_argument("--images", type=int, default=64, help="files of each size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=["640x427", "1600x1200"])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES), metavar="SIDE",
                        help=", ".join(SIDES))
    parser.add_argument("--model", type=Path, help="a CLIP folder to use instead of random weights")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="embedding-") as d:
        work, model = Path(d), args.model
        if model is None:
            model = work / "model"
            subprocess.run([sys.executable, HERE / "sides.py", "model", "-", model, work], check=True,
                           stdout=subprocess.DEVNULL)
        raw = measure(model, work, args)
    result = {"machine": processor(), "date": date.today().isoformat(), "images": args.images, "rounds": args.rounds,
              "weights": "random" if args.model is None else args.model.name,
              **summary(raw, args.images), "raw": raw}
    (args.out / "embedding.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "embedding.md").write_text(page := table(result), encoding="utf-8")
    plot(result, args.out / "embedding.png")
    print(page)
    return result


if __name__ == "__main__":
    main()
