"""The sides of embedding.py. Each takes the same model folder, the same files and batches of 32, and is otherwise as its
own documentation uses it.

A side runs in a process of its own, which embedding.py speaks with: `python sides.py serve SIDE MODEL WORK` answers
one line of JSON for every line that it reads; `python sides.py prepare SIDE MODEL WORK` converts the weights once, in
another process, so that the memory of converting is nobody's. Nothing here sets a number of threads: each library
decides for itself.
"""
import importlib.metadata, json, os, shutil, sys, time, traceback
from pathlib import Path

import numpy as np

BATCH = 32


def batches(items): return [items[i:i + BATCH] for i in range(0, len(items), BATCH)]


class Side:
    peer = False  # runs in the peers' environment, if there is one
    packages: tuple[str, ...] = ()  # whose versions are told
    pixels = ""  # what it does to an image
    vectors_are = "projected"  # or "cls"

    @classmethod
    def prepare(cls, model: Path, work: Path): "Convert the weights."
    def files(self, paths: list[str]): "End to end: this is what is timed."; raise NotImplementedError
    def vectors(self, result,
                paths: list[str]): "What `files` returned, as an array; NaN where the side reports an error."; return np.asarray(result)
    def prepared(self, paths: list[str]) -> list: "Batches as the side's own preprocessing makes them."; raise NotImplementedError
    def model(self, batch): "Vectors of one prepared batch, normalised."; raise NotImplementedError
    def threads(self) -> str: import torch; return f"{torch.get_num_threads()} (torch)"


class Reference(Side):
    "Plain transformers in fp32: the projected vectors, and beside them the CLS token that the document takes."
    def __init__(self, model, work):
        from transformers import CLIPVisionModelWithProjection
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
        self.net, self.processor = CLIPVisionModelWithProjection.from_pretrained(model).eval(), CLIPImageProcessorPil.from_pretrained(model)

    def files(self, paths):
        import torch
        from PIL import Image
        unit, found = torch.nn.functional.normalize, []
        with torch.inference_mode():
            for batch in batches(paths):
                out = self.net(**self.processor(images=[Image.open(p).convert("RGB") for p in batch],
                                                return_tensors="pt"))
                found.append(torch.cat([unit(out.image_embeds), unit(out.last_hidden_state[:, 0])], 1))
        return torch.cat(found)


class Document(Side):
    packages, vectors_are, pixels = ("torch", "transformers",
                                     "Pillow"), "cls", "Pillow decodes; transformers' PIL processor, all of a batch one after the other"

    def __init__(self, model, work):
        import practices_code
        self.embedder = practices_code.Document(str(model), device="cpu")

    def files(self, paths): return self.embedder.encode_images_batch(paths, BATCH)
    def prepared(self, paths): return [self.embedder.processor(images=[self.embedder._load_image(p) for p in b],
                                                               return_tensors="pt") for b in batches(paths)]
    def model(self, batch): return self.embedder._encode_with_clip(batch)


class Ours(Side):
    packages = ("torch", "transformers", "onnxruntime", "Pillow")

    def __init__(self, model, work, precision=None, parquet=False):
        from devsky_nb import CLIPImageEmbedder
        options = {} if precision is None else {"precision": precision}
        self.embedder = CLIPImageEmbedder(str(model), device="cpu", **options)
        self.precision, self.parquet, self.work, self.runs = precision, parquet, work, 0
        self.pixels = f"`load_image` and the model's own preprocessing, in threads; {self.embedder.backend}"

    def files(self, paths):
        if not self.parquet: return list(self.embedder.embed_stream(paths, BATCH))
        from devsky_nb.embedding.bulk import embed_images
        self.runs += 1
        embed_images(paths, out := self.work / f"parquet-{os.getpid()}-{self.runs}", self.embedder, batch_size=BATCH)
        return out

    def vectors(self, result, paths):
        if self.parquet:
            import pyarrow.parquet as pq
            rows = pq.read_table(result, columns=["path", "embedding"]).to_pylist()
            shutil.rmtree(result)
            found = {row["path"]: row["embedding"] for row in rows if row["embedding"] is not None}
        else: found = {paths[r.index]: r.vector for r in result if r.ok}
        return np.array([found.get(p, [np.nan] * self.embedder.dim) for p in paths], np.float32)

    def prepared(self, paths): return batches([self.embedder._prepare(i, p) for i, p in enumerate(paths)])
    def model(self, batch): return np.stack([r.vector for r in self.embedder._finish(batch)])


class SentenceTransformers(Side):
    peer, packages = True, ("torch", "transformers", "sentence-transformers", "torchvision")

    def __init__(self, model, work):
        from sentence_transformers import SentenceTransformer
        self.net = SentenceTransformer(str(model), device="cpu")
        self.pixels = f"its own loading; transformers' {type(self.net[0].processor.image_processor).__name__}"

    def files(self, paths): return self.net.encode(paths, batch_size=BATCH, normalize_embeddings=True,
                                                   show_progress_bar=False)
    def prepared(self, paths): return [self.net.preprocess(b) for b in batches(paths)]

    def model(self, batch):
        import torch
        with torch.inference_mode(): return torch.nn.functional.normalize(self.net(dict(batch))["sentence_embedding"])


class OpenClip(Side):
    peer, packages, pixels = True, ("torch", "torchvision", "open_clip_torch",
                                    "Pillow"), "Pillow decodes; its `preprocess` (torchvision on PIL images), image by image"

    @classmethod
    def prepare(cls, model, work):
        "The same weights under open_clip's names, both towers, as a local-dir that it loads strictly."
        import torch
        from safetensors.torch import load_file, save_file
        cfg, old, new = json.loads((model / "config.json").read_text(encoding="utf-8")), load_file(model / "model.safetensors"), {}
        layer = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj",
                 "mlp.fc1": "mlp.c_fc",
                 "mlp.fc2": "mlp.c_proj"}
        for ours, theirs, tower in (("vision_model", "visual.", cfg["vision_config"]),
                                    ("text_model", "", cfg["text_config"])):
            for i in range(tower["num_hidden_layers"]):
                a, b = f"{ours}.encoder.layers.{i}.", f"{theirs}transformer.resblocks.{i}."
                for kind in ("weight", "bias"):
                    new |= {f"{b}{y}.{kind}": old[f"{a}{x}.{kind}"] for x, y in layer.items()}
                    new[f"{b}attn.in_proj_{kind}"] = torch.cat([old[f"{a}self_attn.{x}_proj.{kind}"] for x in "qkv"])
        for kind in ("weight", "bias"):
            new |= {f"visual.ln_pre.{kind}": old[f"vision_model.pre_layrnorm.{kind}"],
                    f"visual.ln_post.{kind}": old[f"vision_model.post_layernorm.{kind}"],
                    f"ln_final.{kind}": old[f"text_model.final_layer_norm.{kind}"]}
        new |= {"visual.class_embedding": old["vision_model.embeddings.class_embedding"],
                "visual.conv1.weight": old["vision_model.embeddings.patch_embedding.weight"],
                "visual.positional_embedding": old["vision_model.embeddings.position_embedding.weight"],
                "visual.proj": old["visual_projection.weight"].T,
                "token_embedding.weight": old["text_model.embeddings.token_embedding.weight"],
                "positional_embedding": old["text_model.embeddings.position_embedding.weight"],
                "text_projection": old["text_projection.weight"].T, "logit_scale": old["logit_scale"]}
        save_file({k: v.contiguous() for k, v in new.items()}, work / "open_clip_model.safetensors")
        v, t, p = cfg["vision_config"], cfg["text_config"], json.loads((model / "preprocessor_config.json").read_text(encoding="utf-8"))
        (work / "open_clip_config.json").write_text(json.dumps({
            "model_cfg": {"embed_dim": cfg["projection_dim"], "quick_gelu": v["hidden_act"] == "quick_gelu",
                          "vision_cfg": {"image_size": v["image_size"], "layers": v["num_hidden_layers"],
                                         "width": v["hidden_size"],
                                         "patch_size": v["patch_size"],
                                         "head_width": v["hidden_size"] // v["num_attention_heads"]},
                          "text_cfg": {"context_length": t["max_position_embeddings"], "vocab_size": t["vocab_size"],
                                       "width": t["hidden_size"],
                                       "heads": t["num_attention_heads"], "layers": t["num_hidden_layers"]}},
            "preprocess_cfg": {"mean": p["image_mean"], "std": p["image_std"], "interpolation": "bicubic",
                               "resize_mode": "shortest"}}))

    def __init__(self, model, work):
        import open_clip
        self.net, self.preprocess = open_clip.create_model_from_pretrained(f"local-dir:{work}", device="cpu")
        self.net.eval()

    def prepare_batch(self, paths):
        import torch
        from PIL import Image
        return torch.stack([self.preprocess(Image.open(p)) for p in paths])

    def model(self, batch):
        import torch
        with torch.inference_mode(): return self.net.encode_image(batch, normalize=True)

    def files(self, paths): return np.concatenate([self.model(self.prepare_batch(b)) for b in batches(paths)])
    def prepared(self, paths): return [self.prepare_batch(b) for b in batches(paths)]


class FastEmbed(Side):
    "ONNX Runtime. fastembed publishes its CLIP in fp32; int8 is what its users make of such a file with onnxruntime's own tool."
    peer, packages, pixels = True, ("fastembed", "onnxruntime",
                                    "Pillow"), "Pillow decodes; fastembed's own steps in Pillow and numpy, one after the other"

    @classmethod
    def prepare(cls, model, work):
        import torch
        from transformers import CLIPVisionModelWithProjection

        class Images(torch.nn.Module):
            def __init__(self): super().__init__(); self.net = CLIPVisionModelWithProjection.from_pretrained(model).eval()
            def forward(self, pixel_values): return self.net(pixel_values=pixel_values).image_embeds

        shutil.copy(model / "preprocessor_config.json", work)
        edge = json.loads((model / "config.json").read_text(encoding="utf-8"))["vision_config"]["image_size"]
        torch.onnx.export(Images().eval(), (torch.zeros(2, 3, edge, edge),), str(work / "model.onnx"),
                          input_names=["pixel_values"],
                          output_names=["image_embeds"],
                          dynamic_axes={"pixel_values": {0: "n"}, "image_embeds": {0: "n"}}, opset_version=17,
                          dynamo=False)

    def __init__(self, model, work):
        from fastembed import ImageEmbedding
        self.net = ImageEmbedding("Qdrant/clip-ViT-B-32-vision", specific_model_path=str(work))

    def files(self, paths): return list(self.net.embed(paths, batch_size=BATCH))

    def prepared(self, paths):
        from PIL import Image
        return [np.array(self.net.model.processor([Image.open(p) for p in b])) for b in batches(paths)]

    def model(self, batch):
        from fastembed.common.utils import normalize
        return normalize(self.net.model.model.run(None, {"pixel_values": batch})[0])

    def threads(self): return "one for each physical core (ONNX Runtime)"


class FastEmbedInt8(FastEmbed):
    @classmethod
    def prepare(cls, model, work):
        "The linear layers only: the patch convolution in int8 makes the whole slower."
        from onnxruntime.quantization import quantize_dynamic
        super().prepare(model, work)
        (work / "model.onnx").rename(work / "fp32.onnx")
        quantize_dynamic(str(work / "fp32.onnx"), str(work / "model.onnx"), op_types_to_quantize=["MatMul", "Gemm"])


class Limits(Side):
    """How fast this machine multiplies matrices of the model's shapes, and how many images a second that would be if nothing else took time.
    Products with weights count in fp32 or in int8; the two products of attention, whose sides are both activations, in fp32 either way."""
    packages = ("torch", "onnxruntime", "onnx")

    def __init__(self, model, work):
        import torch
        cfg = json.loads((model / "config.json").read_text(encoding="utf-8"))
        v, out = cfg["vision_config"], cfg["projection_dim"]
        width, inner, layers, heads, patch = v["hidden_size"], v["intermediate_size"], v["num_hidden_layers"], v["num_attention_heads"], v["patch_size"]
        patches = (v["image_size"] // patch) ** 2
        rows = BATCH * (patches + 1)
        self.shapes = [((rows, width, width), 4 * layers), ((rows, width, inner), layers),
                       ((rows, inner, width), layers),
                       ((BATCH * patches, 3 * patch**2, width), 1), ((BATCH, width, out), 1)]
        q = torch.randn(BATCH * heads, patches + 1, width // heads)
        a, self.layers = torch.randn(BATCH * heads, patches + 1, patches + 1), layers
        self.attention = [lambda: torch.bmm(q, q.transpose(1, 2)), lambda: torch.bmm(a, q)]
        self.kernels, self.left_out, first = {}, {}, {}
        for shape, _ in self.shapes:
            for name, make in (("fp32 linear", self.fp32), ("fp32 mm", self.mm), ("int8 torch._int_mm", self.int_mm),
                               ("int8 quantized::linear", self.quantized),
                               ("int8 quantized::linear_dynamic", self.dynamic), ("int8 MatMulInteger", self.ort)):
                try:
                    self.kernels[name, shape] = make(*shape)
                    first[name, shape] = self.best(self.kernels[name, shape], 1)
                except Exception as e:
                    self.kernels.pop((name, shape), None)
                    self.left_out[name] = f"{type(e).__name__}: {e}"[:200]
        for (name, shape), seconds in first.items():
            if seconds > 5 * min(s for (other, at), s in first.items() if at == shape and other[:4] == name[:4]):
                del self.kernels[name, shape]  # hopeless

    def fp32(self, m, k, n):
        import torch
        x, w = torch.randn(m, k), torch.randn(n, k)
        return lambda: torch.nn.functional.linear(x, w)

    def mm(self, m, k, n):
        import torch
        x, w = torch.randn(m, k), torch.randn(k, n)
        return lambda: torch.mm(x, w)

    def int_mm(self, m, k, n):
        import torch
        x, w = torch.randint(-127, 128, (m, k), dtype=torch.int8), torch.randint(-127, 128, (n, k), dtype=torch.int8)
        return lambda: torch._int_mm(x, w.T)

    def packed(self, m, k, n):
        import torch
        x, w = torch.randn(m, k), torch.quantize_per_tensor(torch.randn(n, k), .03, 0, torch.qint8)
        return x, torch.ops.quantized.linear_prepack(w, None)

    def quantized(self, m, k, n):
        import torch
        x, w = self.packed(m, k, n)
        x = torch.quantize_per_tensor(x, .03, 64, torch.quint8)
        return lambda: torch.ops.quantized.linear(x, w, 1., 64)

    def dynamic(self, m, k, n):
        import torch
        x, w = self.packed(m, k, n)
        return lambda: torch.ops.quantized.linear_dynamic(x, w)

    def ort(self, m, k, n):
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
        rng = np.random.default_rng(0)
        graph = helper.make_graph([helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "limit",
                                  [helper.make_tensor_value_info("x", TensorProto.UINT8, [m, k])],
                                  [helper.make_tensor_value_info("y", TensorProto.INT32, [m, n])],
                                  [numpy_helper.from_array(rng.integers(-127, 128, (k, n), np.int8), "w")])
        session = onnxruntime.InferenceSession(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)],
                                                                 ir_version=9).SerializeToString())
        x = rng.integers(0, 256, (m, k), np.uint8)
        return lambda: session.run(None, {"x": x})

    @staticmethod
    def best(f, times=5):
        seconds = []
        for _ in range(times):
            start = time.perf_counter(); f(); seconds.append(time.perf_counter() - start)
        return min(seconds)

    def measure(self):
        "Images per second of either kind, and the kernel and speed (billions of multiplications and additions a second) of every shape."
        attention = self.layers * sum(self.best(f) for f in self.attention)
        result = {}
        for kind in ("fp32", "int8"):
            total, detail = attention, {}
            for shape, count in self.shapes:
                found = {name: self.best(f) for (name, other), f in self.kernels.items() if other == shape
                         and name[:4] == kind}
                if not found: break
                name = min(found, key=found.get)
                total += count * found[name]
                detail["x".join(map(str, shape))] = {"kernel": name,
                                                     "gops": round(2 * np.prod(shape) / found[name] / 1e9, 1)}
            else: result[kind] = {"images_per_second": BATCH / total, "shapes": detail}
        return result


def serve(side: Side, ask, answer):
    "Do what is asked, one line at a time; between two lines do nothing."
    def cpu(): t = os.times(); return sum(t[:4])
    versions = {}
    for p in side.packages:
        try: versions[p] = importlib.metadata.version(p)
        except importlib.metadata.PackageNotFoundError: pass
    answer({"threads": side.threads(), "pixels": side.pixels, "packages": versions, "vectors_are": side.vectors_are,
            "left_out": getattr(side, "left_out", {}), "cpu": cpu()})
    for line in ask:
        task, reply = json.loads(line), {"cpu_before": cpu()}
        do, paths = task["do"], task.get("paths", [])
        try:
            if do == "prepared": side.ready = side.prepared(paths)
            start, busy = time.perf_counter(), cpu()
            if do == "files": result = side.files(paths)
            elif do == "model":
                for batch in side.ready: side.model(batch)
            elif do == "measure": reply["limits"] = side.measure()
            elif do == "peak": reply["peak"] = peak()
            reply |= {"seconds": time.perf_counter() - start, "cpu": cpu() - busy}
            if do == "files":
                vectors = side.vectors(result, paths)
                if task.get("save"): np.save(task["save"], vectors)
        except Exception as e:
            traceback.print_exc()
            reply["error"] = f"{type(e).__name__}: {e}"
        answer(reply | {"cpu_after": cpu()})


def peak() -> int | None:
    "The most memory (resident, bytes) that this process held since it was last asked."
    try: found = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
    except OSError: return None
    try: Path("/proc/self/clear_refs").write_text("5")
    except OSError: pass  # some systems do not let a process reset it: then it is the highest since the start
    return found


def make_model(folder: Path):
    "A CLIP of ViT-B/32's shape with random weights, as the Hub would hold it."
    import torch
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    import devsky_nb
    torch.manual_seed(0)
    CLIPModel(CLIPConfig()).eval().save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    for file in (Path(devsky_nb.__file__).parent / "models/tiny-clip").glob("tokenizer*"):
        shutil.copy(file, folder)  # a peer wants one to load at all


SIDES = {
    "document": (Document, {}),
    "devsky_nb": (Ours, {}),
    "devsky_nb int8": (Ours, {"precision": "int8"}),
    "devsky_nb, to Parquet": (Ours, {"precision": "fp32", "parquet": True}),
    "devsky_nb int8, to Parquet": (Ours, {"precision": "int8", "parquet": True}),
    "sentence-transformers": (SentenceTransformers, {}),
    "open_clip": (OpenClip, {}),
    "fastembed": (FastEmbed, {}),
    "fastembed, int8": (FastEmbedInt8, {}),
}
USUAL = ("document", "devsky_nb", "devsky_nb int8", "sentence-transformers", "fastembed", "fastembed, int8")
HELPERS = {"reference": (Reference, {}), "limits": (Limits, {})}

if __name__ == "__main__":
    verb, name, model, work = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    if verb == "model": make_model(model)
    else:
        side, options = (SIDES | HELPERS)[name]
        if verb == "prepare": side.prepare(model, work)
        else:
            out = os.fdopen(os.dup(1), "w", buffering=1)
            os.dup2(2, 1)  # what libraries print goes to the log
            serve(side(model, work, **options), sys.stdin, lambda reply: print(json.dumps(reply), file=out))
