"""Code of the shapes that large libraries and their examples have: right code beside wrong code that looks the same.

The doctor was run over forty public packages, and every finding was looked at; where one was wrong, its shape stands here.
"""
import pytest

DIFFUSERS = "import torch, diffusers as d\n"
CLIP = "import torch\nfrom transformers import AutoModel, AutoTokenizer, CLIPModel, CLIPTextModel\nm = CLIPModel.from_pretrained(x)\n"
FEATURES = CLIP + "a = m.get_image_features(pixel_values=p).pooler_output\n"
LOOP = "for b in batches: m.get_image_features(pixel_values=b)"

# name -> (rule, right code, wrong code)
SHAPES = {
    # keys and values that depend on a condition
    "one of two names": ("DSK021", DIFFUSERS + "kw = {'dtype': h} if new else {'torch_dtype': h}\nd.UNet2DModel.from_pretrained(x, **kw)",
                         DIFFUSERS + "kw = {'dtype': h, 'torch_dtype': h}\nd.UNet2DModel.from_pretrained(x, **kw)"),
    "a key for some values": ("DSK022", DIFFUSERS + "def load(dtype='auto'):\n  kw = {}\n  if dtype != 'auto': kw['torch_dtype'] = dtype\n"
                              "  d.FluxPipeline.from_pretrained(x, **kw)",
                              DIFFUSERS + "def load(dtype='auto'):\n  kw = {}\n  if dtype: kw['torch_dtype'] = dtype\n  d.FluxPipeline.from_pretrained(x, **kw)"),
    "text made a dtype": ("DSK022", DIFFUSERS + "def load(dtype='float16'):\n  if isinstance(dtype, str): dtype = getattr(torch, dtype)\n"
                          "  d.FluxPipeline.from_pretrained(x, dtype=dtype)\nload('bfloat16')",
                          DIFFUSERS + "def load(dtype='float16'):\n  if isinstance(dtype, int): dtype = torch.float16\n  d.FluxPipeline.from_pretrained(x, dtype=dtype)"),
    "text made a dtype at once": ("DSK022",
                                  DIFFUSERS + "def load(t='half'): d.FluxPipeline.from_pretrained(x, dtype=getattr(torch, t) if isinstance(t, str) else t)",
                                  DIFFUSERS + "def load(t='half'): d.FluxPipeline.from_pretrained(x, dtype=t if ready else None)"),
    "a text that ends the function": ("DSK022",
                                      DIFFUSERS + "def load(t='auto'):\n  if t in ('auto', None): return d.FluxPipeline.from_pretrained(x)\n"
                                      "  return d.FluxPipeline.from_pretrained(x, dtype=t)",
                                      DIFFUSERS + "def load(t='auto'):\n  if t in ('none', None): return d.FluxPipeline.from_pretrained(x)\n"
                                      "  return d.FluxPipeline.from_pretrained(x, dtype=t)"),
    "a default that was replaced": ("DSK010",
                                    DIFFUSERS + "def load(config=None):\n  if config is None: config = d.PipelineQuantizationConfig('bitsandbytes_8bit',"
                                    " {'load_in_8bit': True}, ['unet'])\n  d.FluxPipeline.from_pretrained(x, quantization_config=config)\nload()",
                                    DIFFUSERS + "def load(config=None):\n  if config is None: config = d.PipelineQuantizationConfig('bitsandbytes_8bit',"
                                    " {'load_in_8bit': True}, ['unet'])\n  d.FluxPipeline.from_pretrained(x, quantization_config=config)\n"
                                    "load(d.BitsAndBytesConfig(load_in_8bit=True))"),
    # code for several versions
    "asked before": ("DSK044",
                     CLIP + "t = CLIPTextModel.from_pretrained(x)\nif hasattr(t, 'text_model') and t.text_model: t.text_model.embeddings",
                     CLIP + "t = CLIPTextModel.from_pretrained(x)\nif hasattr(t, 'config'): t.text_model.embeddings"),
    "asked in one line": ("DSK044", CLIP + "t = CLIPTextModel.from_pretrained(x)\ne = t.text_model if hasattr(t, 'text_model') else t",
                          CLIP + "t = CLIPTextModel.from_pretrained(x)\ne = t.text_model if t.training else t"),
    "gone if it is not there": ("DSK044",
                                CLIP + "def f():\n  t = CLIPTextModel.from_pretrained(x)\n  if not hasattr(t, 'text_model'): return t\n  return t.text_model",
                                CLIP + "def f():\n  t = CLIPTextModel.from_pretrained(x)\n  if not t: return t\n  return t.text_model"),
    "tried": ("DSK044", CLIP + "t = CLIPTextModel.from_pretrained(x)\ntry: e = t.text_model\nexcept AttributeError: e = t",
              CLIP + "t = CLIPTextModel.from_pretrained(x)\ntry: e = t.text_model\nexcept OSError: e = t"),
    "imported or not": ("DSK040", "try: from diffusers import CLIPModel\nexcept ImportError: from transformers import CLIPModel",
                        "try: from diffusers import CLIPModel\nexcept OSError: pass"),
    "by version": ("DSK031",
                   DIFFUSERS + "p = d.FluxPipeline.from_pretrained(x)\nif version.parse(d.__version__) < version.parse('0.40'): p.enable_vae_tiling()\n"
                   "else: p.vae.enable_tiling()", DIFFUSERS + "p = d.FluxPipeline.from_pretrained(x)\nif small: p.enable_vae_tiling()"),
    "object or tensor": ("DSK043",
                         CLIP + "f = m.get_text_features(**i)\nif not isinstance(f, torch.Tensor): f = f.pooler_output\nelse: f = f.cpu()",
                         CLIP + "f = m.get_text_features(**i)\nif gpu: f = f.cpu()"),
    "code from the Hub": ("DSK043", CLIP + "m = AutoModel.from_pretrained(x, trust_remote_code=True)  # noqa\nm.get_text_features(t).cpu()",
                          CLIP + "m = AutoModel.from_pretrained(x)\nm.get_text_features(t).cpu()"),
    # slicing
    "a pipeline of one's own": ("DSK030",
                                DIFFUSERS + "class P(d.DiffusionPipeline):\n  def save(self): self.enable_attention_slicing('max')",
                                DIFFUSERS + "class P:\n  def save(self, pipe): pipe.enable_attention_slicing('max')"),
    "for Apple": ("DSK030",
                  DIFFUSERS + "p = d.FluxPipeline.from_pretrained(x)\nif torch.backends.mps.is_available(): p.enable_attention_slicing()",
                  DIFFUSERS + "p = d.FluxPipeline.from_pretrained(x)\nif torch.cuda.is_available(): p.enable_attention_slicing()"),
    "for Apple by name": ("DSK030", DIFFUSERS + "p = d.FluxPipeline.from_pretrained(x)\nif device == 'mps': p.enable_attention_slicing()",
                          DIFFUSERS + "p = d.FluxPipeline.from_pretrained(x)\nif device == 'cuda': p.enable_attention_slicing()"),
    # in place
    "div_": ("DSK042", FEATURES + "a.div_(a.norm(dim=-1, keepdim=True))\na @ a.T",
             FEATURES + "a.mul(a.norm(dim=-1, keepdim=True))\na @ a.T"),
    "under another name": ("DSK042", FEATURES + "b = a\nb.div_(b.norm(dim=-1, keepdim=True))\na @ b.T",
                           FEATURES + "b = a\nb.norm(dim=-1)\na @ b.T"),
    "an attribute": ("DSK042", FEATURES + "s.a = a\ns.a.div_(n)\ns.a @ s.a.T", FEATURES + "s.a = a\ns.a.div(n)\ns.a @ s.a.T"),
    "all items": ("DSK042", FEATURES + "a[:] = a / n\na @ a.T", FEATURES + "c[:] = a / n\na @ a.T"),
    "all items divided": ("DSK042", FEATURES + "a[:] /= n\na @ a.T", FEATURES + "c[:] /= n\na @ a.T"),
    "out": ("DSK042", FEATURES + "torch.div(a, n, out=a)\na @ a.T", FEATURES + "torch.div(a, n)\na @ a.T"),
    "a function for it": ("DSK042", FEATURES + "import faiss\nv = a.numpy()\nfaiss.normalize_L2(v)\nv @ v.T",
                          FEATURES + "v = a.numpy()\nprint(v)\nv @ v.T"),
    # gradients
    "requires_grad_": ("DSK033", f"{CLIP}m.requires_grad_(False)\n{LOOP}", f"{CLIP}m.requires_grad_(True)\n{LOOP}"),
    "in a chain": ("DSK033", f"{CLIP}m = CLIPModel.from_pretrained(x).eval().requires_grad_(False).to(y)\n{LOOP}",
                   f"{CLIP}m = m.eval().to(y)\n{LOOP}"),
    "each parameter": ("DSK033", f"{CLIP}for p in m.parameters(): p.requires_grad = False\n{LOOP}",
                       f"{CLIP}for p in m.parameters(): p.requires_grad = True\n{LOOP}"),
    "each parameter's method": ("DSK033", f"{CLIP}for p in m.parameters(): p.requires_grad_(False)\n{LOOP}",
                                f"{CLIP}for p in m.parameters(): p.numel()\n{LOOP}"),
    "a function that freezes": ("DSK033", f"{CLIP}freeze(m)\n{LOOP}", f"{CLIP}unfreeze(m)\n{LOOP}"),
    "another model": ("DSK033", f"{CLIP}o = CLIPModel.from_pretrained(y)\nm.requires_grad_(False)\n{LOOP}",
                      f"{CLIP}o = CLIPModel.from_pretrained(y)\no.requires_grad_(False)\n{LOOP}"),
    # failures
    "another way": ("DSK060", "import torch\ntry: w = load_model(x)\nexcept: w = torch.load(y)",
                    "import torch\ntry: w = load_model(x)\nexcept: w = None"),
    "the first that works": ("DSK060",
                             CLIP + "def f():\n  for k in kinds:\n    try: return k.from_pretrained(x)\n    except Exception: continue\n  raise E",
                             CLIP + "def f():\n  for k in kinds:\n    try: k.from_pretrained(x)\n    except Exception: continue"),
    "what belongs to a model": ("DSK060", CLIP + "try: t = AutoTokenizer.from_pretrained(x)\nexcept Exception: pass",
                                CLIP + "try: t = AutoModel.from_pretrained(x)\nexcept Exception: pass"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_right_code_is_told_from_wrong_code_of_its_shape(name, scan):
    rule, right, wrong = SHAPES[name]
    assert rule not in {found for found, _ in scan(right)}
    assert rule in {found for found, _ in scan(wrong)}


# ---- comments ----

CALL = "from diffusers import DiffusionPipeline as D\nD.from_pretrained(x, load_in_4bit=True)"
COMMENTS = {
    "# ruff: noqa": True, "# flake8: noqa": True, "#ruff:noqa": True, "# RUFF: NOQA": True, "# ruff: noqa: DSK011": True,
    "    # ruff: noqa": True,
    "# flake8: noqa: E501, DSK011": True, "# ruff: noqa:DSK01": True, "# ruff: noqa  # generated": True,
    "# ruff: noqa: DSK050": False, "# ruff: noqa: E501": False, "# ruff: noqa because": False, "# ruff: noqasa": False,
    "x = 1  # ruff: noqa": False,
    "'''\n# ruff: noqa\n'''": False, "# noqa": False, "# pylint: noqa": False,
}


@pytest.mark.parametrize("comment, silent", COMMENTS.items(), ids=COMMENTS)
def test_comments_about_a_file(comment, silent, scan):
    for text in (f"{comment}\n{CALL}", f"{CALL}\n{comment.lstrip()}\n"):
        assert ("DSK011" not in {rule for rule, _ in scan(text)}) is silent, text


LINE_COMMENTS = {"# noqa": True, "# noqa: DSK011": True, "#NOQA:DSK011": True, "# type: ignore  # noqa: E501,DSK011": True,
                 "# noqa: DSK0": True,
                 "# noqa: DSK012": False, "+ '# noqa'": False, "# no qa": False}


@pytest.mark.parametrize("comment, silent", LINE_COMMENTS.items(), ids=LINE_COMMENTS)
def test_comments_about_a_line(comment, silent, scan):
    assert ("DSK011" not in {rule for rule, _ in scan(f"{CALL} {comment}")}) is silent


def test_a_comment_in_a_cell_is_about_the_notebook(tmp_path):
    import json
    from devsky_nb.doctor.scan import scan_source
    for first, count in (("# ruff: noqa: DSK011", 0), ("# other", 2)):
        sources = [first, CALL, f"%time {CALL.splitlines()[1]}", f"%time {CALL.splitlines()[1]}  # noqa"]
        notebook = {"cells": [{"cell_type": "code", "source": source} for source in sources]}
        (tmp_path / "a.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
        assert len(scan_source(tmp_path, select="DSK011")) == count
