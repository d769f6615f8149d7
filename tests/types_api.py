"""A program that uses the whole public API as a user does. It is never run: `make types` reads it, so that a class that lost a
method, a stub that lost a name or an annotation that says less than before is noticed."""
from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_type

import numpy as np
import torch
from PIL import Image

from devsky_nb import (
    CLIPImageEmbedder, DevSkyyError, ExportReport, FolderIndex, Garment, ImageEmbedder, ImagePolicy, ImageSetContract, InsufficientMemoryError,
    MLError, ModelLoadError, ModelNotFoundError, ModelRegistry, ModelSpec, PipelineGenerator, QuantizedSDXLGenerator, ValidationError,
    SearchReport, ValidationReport, VectorIndex, VramMonitor, cache_manager, cache_report, check_environment, check_image_set,
    check_pipeline_call, embed_images, embedding_explorer, estimate_vram, export_embeddings, fix_source, load_image, load_model,
    load_lora, load_quantized, load_quantized_pipeline, load_sdxl_pipeline_with_quantization_v1, load_sdxl_pipeline_with_quantization_v2,
    memory_planner, pin, plan_eviction, plan_vram, quantization_explorer, render_garment, save_quantized,
    scan_source, search_images, similar_pairs, unload_lora, unpin, validate_image_embeddings, validation_review, verify_cache, vram_timeline,
    write_catalogue,
)


def errors() -> None:
    failures: list[type[MLError]] = [ModelNotFoundError, ModelLoadError, InsufficientMemoryError]
    try: raise ValidationError("a value is wrong", details={"value": 1}, original_error=OSError())
    except DevSkyyError as e: assert_type(e.to_dict(), dict)
    print(failures)


def hub(cache: Path) -> None:
    registry = ModelRegistry(cache_dir=cache, lockfile="models.json", max_bytes=2**30, offline=True)
    spec = registry.register(ModelSpec("mine", "org/mine", kind="clip"))
    assert_type(spec, ModelSpec)
    assert_type(registry.spec("tiny-clip").repo_id, str)
    model = registry.get_model("tiny-clip", revision="main", device="cpu", dtype=torch.float32)
    with registry.lease("tiny-clip") as leased: print(model is leased)
    assert_type(registry.locate("tiny-clip"), Path)
    assert_type(registry.prefetch("tiny-clip").ok, bool)
    assert_type(registry.verify("tiny-clip").ok, bool)
    assert_type(registry.unload("tiny-clip"), int)
    print(registry.promote("mine", "production")["stage"], registry.versions("mine"))
    print(registry.specs(), load_model("tiny-clip", device="cpu", dtype=torch.bfloat16, cache_dir=cache))
    print(cache_report(cache).to_dict(), verify_cache(cache_dir=cache).ok)
    assert_type(pin("org/mine", "main", "mine", cache), Path)
    assert_type(unpin("org/mine", "mine", cache), bool)
    print(plan_eviction(max_bytes=10**9, unused_days=30, keep=["org/mine"], cache_dir=cache).execute())


def images(data: bytes, array: np.ndarray, image: Image.Image) -> None:
    policy = ImagePolicy(max_pixels=10**6, background=(255, 255, 255), root=".")
    opened, record = load_image("shirt.jpg", policy)
    assert_type(opened, Image.Image)
    for source in (Path("shirt.jpg"), data, array, image): print(load_image(source)[0].size, record)


def embedding(paths: list[Path], folder: Path) -> None:
    registry = ModelRegistry()
    with CLIPImageEmbedder("tiny-clip", device="cpu", output="projected", offline=True, registry=registry, revision=None) as embedder:
        assert_type(embedder.encode_image("shirt.jpg"), torch.Tensor)
        assert_type(embedder.encode_images_batch((p for p in paths), batch_size=8), torch.Tensor)
        assert_type(embedder.encode_text("a red dress"), torch.Tensor)
        assert_type(embedder.encode_text(["a red dress", "a blue shirt"]), torch.Tensor)
        assert_type((embedder.dim, embedder.fingerprint), tuple[int, str])
        for result in embedder.embed_stream(paths): print(result.index, result.vector if result.ok else result.error)
        others: list[ImageEmbedder] = [embedder, ImageEmbedder("siglip2-base", backend="torch", precision="fp32", output=None)]
        assert_type([other.reads_texts for other in others], list[bool])
        assert_type(others[1].zero_shot(np.zeros((1, 768), np.float32), ["dress"], relative=True), np.ndarray)
        report = embed_images(folder, "vectors", embedder, resume=True, engine="local")
        assert_type(report.embedded, int)
        index = FolderIndex("vectors")
        found = index.search(texts=["a red dress"], embedder=embedder, k=3)
        print(found, index.vectors.shape, index.ids, index.paths)
    answers = search_images("vectors", ["a red dress"], images=[paths[0]], k=3)
    assert_type(answers, SearchReport)
    assert_type(answers.to_html("found.html"), Path)
    print(answers.neighbours.ids, answers.to_dict())
    exported = export_embeddings("vectors", "shop.parquet", to="parquet", overwrite=True, copies="listed")
    assert_type(exported, ExportReport)
    assert_type(exported.rows, int)
    vectors = VectorIndex(np.eye(3, dtype=np.float32), ids=["a", "b", "c"])
    print(len(vectors), vectors.search(np.eye(3, dtype=np.float32), k=2))
    for pairs in similar_pairs(np.eye(3, dtype=np.float32), cosine=.9): assert_type(pairs, np.ndarray)


def validation(embedder: CLIPImageEmbedder) -> None:
    image_set = {"images": [{"id": "a", "path": "a.jpg"}], "metadata": {}}
    result = validate_image_embeddings(image_set, embedder, validation_threshold=.8)
    print(result["success_rate"])
    contract = ImageSetContract(labels=("dress",), min_success=.9)
    assert_type(ImageSetContract.from_yaml("contract.yaml"), ImageSetContract)
    report = check_image_set(image_set, embedder, contract)
    assert_type(report, ValidationReport)
    assert_type(report.ok, bool)
    assert_type(report.to_html("report.html"), Path)
    assert_type(report.to_accepted("accepted.csv"), Path)
    print(report.accepted()[0]["id"], report.contract)
    print(report.counts["embedded"], report.findings, report.results, report.verdict, check_image_set("folder", embedder).to_dict())


def memory() -> None:
    registry = ModelRegistry()
    estimate = estimate_vram("sdxl-base", dtype="fp16", quant="nf4", offload="model", width=1024, height=1024, registry=registry)
    assert_type(estimate.peak_allocated, int)
    assert_type(estimate.by_phase, dict[str, int])
    assert_type(estimate.by_component, dict[str, int])
    print(estimate.loaded + estimate.peak_reserved)
    plan = plan_vram("sdxl-base", "8GB")
    for option in plan.options: print(option.label, option.estimate.peak_allocated, option.margin, option.code)
    if plan.best is not None: assert_type(plan.best.code, str)
    with VramMonitor(device="cpu", interval=.01) as monitor:
        with monitor.phase("load"): pass
    print(monitor.timeline.peak, monitor.timeline.to_dict())


def diffusion(folder: Path) -> None:
    check_pipeline_call(dtype=torch.float16)
    with QuantizedSDXLGenerator("tiny-sdxl", use_4bit=True, device="cpu", registry=ModelRegistry()) as generator:
        image = generator.generate("a red striped t-shirt", num_inference_steps=6, guidance_scale=3, seed=3, progress=False)
        assert_type(image.size, tuple[int, int])
        for drawn in generator.generate_batch(["a dress", "a coat"], batch_size=2): assert_type(drawn.mode, str)
        for drawn in generator.generate_stream(["a dress"], seeds=[1]): drawn.save("dress.png")
    with PipelineGenerator("tiny-sdxl", {"unet": "int8"}, "bitsandbytes", "cpu", low_memory=True) as general:
        assert_type(general.generate("a coat", image=image, mask_image=image, strength=.5, true_cfg_scale=None).mode, str)
        assert_type(PipelineGenerator.check("tiny-sdxl", ["a coat"], width=64)[0], dict[str, Any])
    pipeline = load_sdxl_pipeline_with_quantization_v1("tiny-sdxl", use_4bit=True, device="cpu")
    assert_type(save_quantized(pipeline, folder), Path)
    print(load_quantized_pipeline("tiny-sdxl", {"unet": "int8"}, "bitsandbytes", device="cpu").load_report)
    assert_type(load_lora(pipeline, folder / "style.safetensors", .8, adapter="style").rank, int)
    assert_type(unload_lora(pipeline), list[str])
    print(load_quantized(folder, device="cpu"), load_sdxl_pipeline_with_quantization_v2("tiny-sdxl", quantize_text_encoders=False))


def doctor() -> None:
    findings = scan_source("app", select=["DSK01"])
    for finding in findings: print(finding.rule, finding.line, finding.cell, finding.message, finding.fix)
    print(len(fix_source("app")), check_environment(model="sdxl-base", budget="8GB").to_dict())


def draw(captions: list[str]) -> list[Image.Image]:
    return [render_garment(Garment("dress", "red"), size=64, seed=n) for n, _ in enumerate(captions)]


def demo() -> Iterator[str]:
    image_set = write_catalogue("catalogue", n=24, seed=0, draw=draw)
    for entry in image_set["images"]: yield entry["path"]
    yield Garment("dress", "red", "striped").caption


def widgets(folder: Path, embedder: CLIPImageEmbedder) -> list[object]:
    return [
        memory_planner("sdxl-base", budget="8GB"),
        quantization_explorer("tiny-sdxl", "a red dress", steps=4),
        embedding_explorer(folder, embedder),
        validation_review([{"path": "a.jpg"}], embedder),
        cache_manager(folder),
        vram_timeline(device="cpu"),
    ]
