"What the doctor must find in a program, and what it must leave alone."
import importlib.util, re
from pathlib import Path

import pytest

from devsky_nb.doctor.findings import Findings
from devsky_nb.doctor.rule import RULES, events_of, scan_file, source_of
from devsky_nb.doctor.scan import SOURCE_RULES, fix_source, scan_source
from devsky_nb.doctor.source import SourceFile, document_parts

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("code", sorted(RULES))
def test_each_rule_finds_its_wrong_example_and_leaves_the_right_one(code, scan):
    rule = RULES[code]
    assert code in {found for found, _ in scan(rule.wrong)}
    assert scan(rule.right) == []
    assert rule.examples_hold()
    assert re.fullmatch(r"DSK0\d\d", code) and rule.why.endswith(".")


def test_a_rule_shows_itself_in_a_notebook():
    shown = RULES["DSK020"]._repr_markdown_()
    assert RULES["DSK020"].why in shown and RULES["DSK020"].wrong in shown and RULES["DSK020"].right in shown
    assert "shop.py:3:50: DSK020 info: torch_dtype is the old name of dtype" in shown
    assert "\n+pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float16)\n" in shown
    assert "`--fix` does:" not in RULES["DSK050"]._repr_markdown_()


# ---- what is found, and what is not ----

PIPELINE = """\
import torch
from diffusers import StableDiffusionXLPipeline as P, BitsAndBytesConfig
import transformers
import diffusers as d
"""

WAYS = [
    'P.from_pretrained(x, quantization_config=BitsAndBytesConfig(load_in_8bit=True))',
    """\
kw = dict(quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True))
P.from_pretrained(x, **kw)""",
    """\
kw = {'variant': 'fp16'}
kw['quantization_config'] = BitsAndBytesConfig(load_in_8bit=True)
P.from_pretrained(x, **kw)""",
    """\
kw = {}
kw.update(quantization_config=BitsAndBytesConfig(load_in_8bit=True))
P.from_pretrained(x, **kw)""",
    """\
kw = {'a': 1} | {'quantization_config': BitsAndBytesConfig(load_in_8bit=True)}
P.from_pretrained(x, **{**kw})""",
    """\
def c(**k): return BitsAndBytesConfig(**k)
P.from_pretrained(x, quantization_config=c(load_in_8bit=True))""",
    """\
def c():
  r = BitsAndBytesConfig(load_in_8bit=True)
  return r
def load(): return P.from_pretrained(x, quantization_config=c())""",
    """\
def load(config): return P.from_pretrained(x, quantization_config=config)
load(BitsAndBytesConfig(load_in_8bit=True))""",
    """\
def load(**kw): return P.from_pretrained(x, **kw)
load(quantization_config=BitsAndBytesConfig(load_in_8bit=True))""",
    """\
class A:
  config = BitsAndBytesConfig(load_in_8bit=True)
  def load(self): return P.from_pretrained(x, quantization_config=self.config)""",
    """\
class A:
  def load(self): return P.from_pretrained(x, quantization_config=self.config)
  def __init__(self): self.config = BitsAndBytesConfig(load_in_8bit=True)""",
    """\
class A:
  def __init__(self, c): self.c = c
  def load(self): return P.from_pretrained(x, quantization_config=self.make())
  def make(self): return BitsAndBytesConfig(load_in_8bit=True)""",
    """\
class B(P): pass
B.from_pretrained(x, quantization_config=BitsAndBytesConfig(load_in_8bit=True))""",
    """\
L = P.from_pretrained
L(x, quantization_config=BitsAndBytesConfig(load_in_8bit=True))""",
    """\
from functools import partial
L = partial(P.from_pretrained, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
L(x)""",
    """\
c = BitsAndBytesConfig(load_in_8bit=True) if small else None
P.from_pretrained(x, quantization_config=c)""",
    """\
c = None
if small:
  c = BitsAndBytesConfig(load_in_8bit=True)
P.from_pretrained(x, quantization_config=c)""",
    """\
try:
  from diffusers import FluxPipeline as F
except ImportError:
  F = None
F.from_pretrained(x, quantization_config=BitsAndBytesConfig(load_in_8bit=True))""",
    """\
config = d.quantizers.quantization_config.BitsAndBytesConfig(load_in_8bit=True)
d.pipelines.flux.FluxPipeline.from_pretrained(x, quantization_config=config)""",
    """\
import importlib
m = importlib.import_module('diffusers')
m.FluxPipeline.from_pretrained(x, quantization_config=BitsAndBytesConfig(load_in_8bit=True))""",
    '(c := BitsAndBytesConfig(load_in_8bit=True)); P.from_pretrained(x, quantization_config=c)',
    """\
c, other = BitsAndBytesConfig(load_in_8bit=True), 1
P.from_pretrained(x, quantization_config=c)""",
    """\
async def f():
  async with g() as h:
    await h(P.from_pretrained(x, quantization_config=BitsAndBytesConfig(load_in_8bit=True)))""",
]


@pytest.mark.parametrize("way", WAYS)
def test_a_configuration_is_followed_on_every_way_to_a_pipeline(way, scan):
    assert {rule for rule, _ in scan(PIPELINE + way)} == {"DSK010"}


RIGHT = [
    """\
import torch
from transformers import CLIPModel
clip = CLIPModel.from_pretrained(x)
class Head(torch.nn.Module):
    def __init__(self): self.linear = torch.nn.Linear(768, 3)
    def forward(self, image): return self.linear(clip.vision_model(image).pooler_output)""",
    """\
from transformers import CLIPModel
model = CLIPModel.from_pretrained(x)
v = model.visual_projection(model.vision_model(image)[1])
v = v / v.norm(dim=-1, keepdim=True)
hidden = model.vision_model(image).last_hidden_state""",
    """\
from transformers import SiglipModel
model = SiglipModel.from_pretrained(x)
v = model.vision_model(image).pooler_output
v = v / v.norm(dim=-1, keepdim=True)""",
    """\
class P:
  @classmethod
  def from_pretrained(cls, *a, **k): ...
from diffusers import BitsAndBytesConfig
P.from_pretrained(x, quantization_config=BitsAndBytesConfig(load_in_8bit=True))""",
    """\
from diffusers import FluxPipeline, BitsAndBytesConfig
c = BitsAndBytesConfig(load_in_8bit=True)
c = make()
FluxPipeline.from_pretrained(x, quantization_config=c)""",
    """\
from diffusers import FluxTransformer2DModel as M, BitsAndBytesConfig
M.from_pretrained(x, quantization_config=BitsAndBytesConfig(load_in_8bit=True))""",
    """\
from transformers import BitsAndBytesConfig as B
B(load_in_4bit=four, load_in_8bit=not four, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype='bfloat16')""",
    """\
import diffusers
def c(four):
  if four: return dict(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype='bfloat16')
  return dict(load_in_8bit=True)
settings = c(x)
diffusers.PipelineQuantizationConfig('bitsandbytes_8bit', quant_kwargs=settings, components_to_quantize=['unet'])""",
    """\
import diffusers, torch
diffusers.PipelineQuantizationConfig(quant_mapping={'unet': diffusers.TorchAoConfig('int8wo')})""",
    """\
from transformers import AutoModel
AutoModel.from_pretrained(x, dtype='float16')
AutoModel.from_pretrained(x, dtype='auto')""",
    """\
import torch
from transformers import AutoModel, BitsAndBytesConfig as B
m = AutoModel.from_pretrained(x, quantization_config=B(load_in_8bit=True) if q else None)
m = m if q else m.half()""",
    """\
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained(x)
model.half().to(torch.bfloat16)
image = image.half().float()""",
    """\
import torch
from diffusers import AutoencoderKLWan as V, WanPipeline as W
W.from_pretrained(x, vae=V.from_pretrained(x, subfolder='vae', dtype=torch.float32), dtype=torch.bfloat16)""",
    """\
import torch, diffusers as d
vae = d.AutoencoderKL.from_pretrained(x).to(torch.float16)
d.StableDiffusionXLPipeline.from_pretrained(x, vae=vae, dtype=torch.float16)""",
    """\
from diffusers import DiffusionPipeline as D
D.from_pretrained(x).to('mps').enable_attention_slicing()""",
    """\
class Mine:
  def enable_vae_tiling(self): ...
  def run(self): self.enable_vae_tiling()""",
    """\
import torch
from transformers import CLIPModel
model = CLIPModel.from_pretrained(x)
@torch.no_grad()
def embed(b): return model.get_image_features(**b)
for b in bs: embed(b)""",
    """\
import torch
from transformers import CLIPModel
model = CLIPModel.from_pretrained(x)
def embed(b): return model(**b)
with torch.inference_mode():
  for b in bs: embed(b)""",
    """\
from transformers import CLIPModel, CLIPProcessor
model, p = CLIPModel.from_pretrained(x), CLIPProcessor.from_pretrained(x)
for b in bs:
  loss = model(**p(b), return_loss=True).loss
  loss.backward()""",
    """\
from transformers import CLIPModel
model = CLIPModel.from_pretrained(x)
o = model(**inputs)
print(o.logits_per_image, o.image_embeds @ o.text_embeds.T)""",
    """\
from transformers import CLIPModel
model = CLIPModel.from_pretrained(x)
a = model.get_image_features(**i).pooler_output
a /= a.norm(dim=-1, keepdim=True)
b = a.cpu().numpy()
b @ b.T""",
    """\
from transformers import CLIPModel
import torch.nn.functional as F
model = CLIPModel.from_pretrained(x)
F.cosine_similarity(model.get_image_features(**i).pooler_output, model.get_text_features(**t).pooler_output)""",
    """\
from transformers import BertModel
BertModel.from_pretrained(x)(**i).last_hidden_state[:, 0]""",
    """\
from transformers import CLIPModel, CLIPTextModelWithProjection as W
CLIPModel.from_pretrained(x).text_model
W.from_pretrained(x).text_model""",
    """\
import torch
torch.load('x.pt')
torch.load('x.pt', weights_only=True)""",
    """\
import pickle, json
pickle.load(open('session.cache', 'rb'))
json.load(open('x.pt'))""",
    """\
from transformers import CLIPModel
CLIPModel.from_pretrained('./models/clip')
CLIPModel.from_pretrained('models/clip')
CLIPModel.from_pretrained('/data/a/b')
CLIPModel.from_pretrained(name)
CLIPModel.from_pretrained('openai/clip', revision='v1.0')
CLIPModel.from_pretrained('openai/clip', revision=commit)""",
    """\
try: x = int(text)
except: x = 0
import torch""",
    """\
import torch, huggingface_hub
try: n = torch.cuda.device_count(); huggingface_hub.whoami()
except Exception: pass""",
    """\
import torch
from transformers import AutoModel
try: m = AutoModel.from_pretrained(x)
except:
  clean(); raise""",
    """\
from transformers import AutoModel
try: m = AutoModel.from_pretrained(x)
except Exception as e: raise MLError('failed', original_error=e)""",
    """\
from transformers import AutoModel
try: m = AutoModel.from_pretrained(x)
except Exception:
  logger.exception('failed')
  raise MLError('failed')""",
    """\
import os
os.environ['HF_HOME'] = '/x'
import transformers
os.environ['HF_TOKEN'] = t
os.environ['TOKENIZERS_PARALLELISM'] = 'false'""",
    """\
from typing import TYPE_CHECKING
import os
if TYPE_CHECKING: import transformers
os.environ['HF_HOME'] = '/x'""",
    """\
import os
def late():
  import transformers
def early(): os.environ['HF_HOME'] = '/x'""",
    """\
import os, accelerate, torch
os.environ['HF_HOME'] = '/x'""",
    """\
def from_pretrained(*a, **k): ...
from_pretrained('a/b', trust_remote_code=False, torch_dtype='x', load_in_4bit=True)""",
    """\
import diffusers, torch, transformers as t
m = diffusers.UNet2DConditionModel.from_pretrained(x, load_in_8bit=False)
m = m.half()
settings = {'load_in_8bit': True}
t.AutoTokenizer.from_pretrained(x, **settings)
t.pipeline('text-generation', x, model_kwargs={'quantization_config': t.BitsAndBytesConfig(**settings)})
try: t.AutoModel.from_pretrained(x, load_in_8bit=True)
except TypeError: t.AutoModel.from_pretrained(x, quantization_config=t.BitsAndBytesConfig(**settings))
quantized = settings if old else {'quantization_config': t.BitsAndBytesConfig(**settings)}
t.AutoModel.from_pretrained(x, **quantized)""",
]


@pytest.mark.parametrize("code", RIGHT)
def test_right_code_is_left_alone(code, scan):
    assert scan(code) == []


WRONG = [
    ("""\
from os import environ as e
import transformers
e['HF_HOME'] = 'x'
e.update({'HF_HUB_OFFLINE': '1'})
e |= {'HF_ENDPOINT': 'y'}""", [("DSK001", 3), ("DSK001", 4), ("DSK001", 5)]),
    ("""\
import os
if x:
  from diffusers import A
os.putenv('HF_HOME', 'x')""", [("DSK001", 4)]),
    ("""\
import transformers, os
def setup(): os.environ.setdefault('HF_HOME', 'x')
setup()""", [("DSK001", 2)]),
    ("""\
import os
def use():
  import transformers
use()
os.environ['HF_HOME'] = 'x'""", [("DSK001", 5)]),
    ("""\
import diffusers
q = diffusers.PipelineQuantizationConfig('bitsandbytes_8bit', {'x': 1}, ['unet'])""", [("DSK012", 2)]),
    ("""\
import diffusers
def load(dtype='float16'): return diffusers.FluxPipeline.from_pretrained(x, dtype=dtype)""", [("DSK022", 2)]),
    ("""\
import transformers
transformers.pipeline('image-classification', model='a/b', torch_dtype='auto')""", [("DSK050", 2), ("DSK020", 2)]),
    ("""\
import torch
from transformers import AutoModel as A, BitsAndBytesConfig as B
m = A.from_pretrained(x, quantization_config=B(load_in_8bit=True)).eval()
m.to('cuda')
m.to('cuda', torch.float16)
m.bfloat16()""", [("DSK024", 5), ("DSK024", 6)]),
    ("""\
import diffusers, transformers as t
diffusers.UNet2DConditionModel.from_pretrained(x, load_in_8bit=True).half()
t.AutoModelForCausalLM.from_pretrained(x, load_in_8bit=True)
t.AutoModelForCausalLM.from_pretrained(x, load_in_4bit=False)
t.pipeline('text-generation', x, model_kwargs={'load_in_4bit': True})""", [("DSK011", 2), ("DSK016", 3), ("DSK016", 4), ("DSK016", 5)]),
    ("""\
import torch
from transformers import CLIPModel
m = CLIPModel.from_pretrained(x)
def one(b): return m(**b)
def all(bs): return [one(b) for b in bs]""", [("DSK033", 4)]),
    ("""\
import numpy as np
from transformers import CLIPVisionModelWithProjection as C
m = C.from_pretrained(x)
a = m(**i).image_embeds.detach().cpu().numpy()
np.dot(a, q)""", [("DSK042", 5)]),
    ("""\
import faiss
from transformers import CLIPModel
m = CLIPModel.from_pretrained(x)
index = faiss.IndexFlatIP(512)
index.add(m.get_image_features(**i).pooler_output.numpy())""", [("DSK042", 5)]),
    ("""\
import torch
from transformers import CLIPModel
m = CLIPModel.from_pretrained(x)
f = m.get_text_features(**i)
torch.nn.functional.normalize(f)""", [("DSK043", 5)]),
    ("""\
import diffusers
print(diffusers.CLIPTextModel)""", [("DSK040", 2)]),
    ("""\
import torch, diffusers as d
p = d.StableDiffusionXLPipeline.from_pretrained(x, dtype=torch.float16)
p.vae.to(torch.float32)""", [("DSK023", 3)]),
    ("""\
import torch, diffusers as d
u = d.UNet2DConditionModel.from_pretrained(x, dtype=torch.float16)
parts = {'unet': u, 'vae': d.AutoencoderKL.from_pretrained(x)}
d.StableDiffusionXLPipeline(**parts)""", [("DSK023", 4)]),
    ("""\
import diffusers as d
q = d.PipelineQuantizationConfig('bitsandbytes_8bit', {'load_in_8bit': True}, ['unet'])
p = d.DiffusionPipeline.from_pretrained(x, quantization_config=q)
p.unet.half()
p.vae.half()""", [("DSK024", 4)]),
    ("""\
from transformers import CLIPModel
m = CLIPModel.from_pretrained(x)
def cos(a, b): return (a * b).sum(-1)
cos(m.get_image_features(**i).pooler_output, m.get_text_features(**t).pooler_output)""", [("DSK042", 3)]),
    ("""\
import diffusers as d
d.StableDiffusionXLPipeline.from_pretrained(x).text_encoder.text_model""", [("DSK044", 2)]),
    ("""\
from transformers import CLIPModel
class Embedder:
    def __init__(self): self.model = CLIPModel.from_pretrained(x)
    def __call__(self, image): return self.model.vision_model(pixel_values=image)[1].numpy()""", [("DSK045", 4)]),
    ("""\
import torch.nn.functional as F
from transformers import AutoProcessor, CLIPModel
model = CLIPModel.from_pretrained(x).eval()
out = model.vision_model(**inputs, return_dict=True)
vectors.append(F.normalize(out['pooler_output'], dim=-1))""", [("DSK045", 5)]),
    ("""\
import torch
def f(unet): unet.enable_cache(None)""", [("DSK032", 2)]),
    ("""\
import pickle
with open('clip.pkl', 'rb') as f: m = pickle.load(f)
n = pickle.load(model_file)""", [("DSK052", 2), ("DSK052", 3)]),
    ("""\
import joblib
joblib.load('model.joblib')""", [("DSK052", 2)]),
    ("""\
try:
  model = load_model(x)
except BaseException:
  model = None
import torch""", [("DSK060", 3)]),
    ("""\
try:
  model = load_model(x)
except Exception:
  raise MLError('failed')
import torch""", [("DSK061", 4)]),
    ("""\
from transformers import AutoModel
try:
  AutoModel.from_pretrained(x)
except Exception as e:
  raise E('x') from None""", [("DSK061", 5)]),
]


@pytest.mark.parametrize("code, expected", WRONG)
def test_wrong_code_is_found_in_its_line(code, expected, scan):
    assert scan(code) == expected


# ---- the document, and the libraries' own ----

PRACTICES = {
    32: "DSK001",  # HF_HOME, after the import of transformers
    33: "DSK002",  # TRANSFORMERS_CACHE
    93: "DSK014",  # no components_to_quantize
    **dict.fromkeys((109, 207, 213, 221, 231, 237, 247, 253, 317, 400), "DSK020"),  # torch_dtype
    308: "DSK015",  # no bnb_4bit_quant_type
    316: "DSK010",  # BitsAndBytesConfig given to a pipeline
    405: "DSK030",  # enable_attention_slicing
    714: "DSK041",  # last_hidden_state[:, 0, :]
}


def test_the_document_gives_the_findings_that_the_facts_justify_and_no_others():
    assert {f.line: f.rule for f in scan_source(ROOT / "tests" / "practices.md")} == PRACTICES


HEAD = """\
import os
from transformers import CLIPVisionModel, CLIPImageProcessor

# Set cache directory
os.environ["HF_HOME"] = "/app/.cache/huggingface"
os.environ["TRANSFORMERS_CACHE"] = "/app/.cache/transformers"
"""
RIGHT_HEAD = """\
import os
os.environ["HF_HOME"] = "/app/.cache/huggingface"

from transformers import CLIPVisionModel, CLIPImageProcessor
"""
SETTINGS = '"bnb_4bit_use_double_quant": True,\n            }'
CONFIG = "bnb_config = BitsAndBytesConfig(\n    load_in_4bit=True,\n    bnb_4bit_compute_dtype=torch.float16\n)"
CORRECTIONS = [
    (HEAD, RIGHT_HEAD),
    (f"{SETTINGS}\n", f'{SETTINGS},\n            components_to_quantize=["unet", "text_encoder", "text_encoder_2"]\n'),
    (CONFIG, "bnb_config = None"),
    ("        self.pipeline.enable_attention_slicing()\n", ""),
    ("outputs.last_hidden_state[:, 0, :]", "outputs.image_embeds"),
    ("CLIPVisionModel.from", "CLIPVisionModelWithProjection.from"),
]


def test_the_document_corrected_gives_none(tmp_path):
    text = (ROOT / "tests" / "practices.md").read_text(encoding="utf-8")
    for old, new in CORRECTIONS:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "practices.md").write_text(text, encoding="utf-8")
    assert {f.rule for f in fix_source(tmp_path / "practices.md")} == {"DSK020"}
    assert scan_source(tmp_path / "practices.md") == []


DOCUMENT = """\
```python
import transformers as t
model = t.CLIPVisionModel.from_pretrained(x)
```

```python
import os
os.environ['HF_HOME'] = '/x'
```

```py
model(**i).last_hidden_state[:, 0, :]
```
"""


def test_blocks_of_a_document_share_names_and_not_imports(scan):
    assert scan(DOCUMENT, "doc.md") == [("DSK041", 12)]


EXAMPLE = re.compile(r'^EXAMPLE_DOC_STRING\w* = (?:\(\n)?\s*r?"""(.*?)"""', re.DOTALL | re.MULTILINE)


def docstrings(package):
    "Every example in the docstrings of an installed package, with the file that it is in."
    folder = Path(importlib.util.find_spec(package).origin).parent
    for file in sorted(folder.glob("pipelines/**/*.py")):
        for text in EXAMPLE.findall(file.read_text(encoding="utf-8")): yield file.relative_to(folder), text


def test_the_documentation_examples_of_diffusers_give_no_warning():
    blocks, notes = 0, set()
    for file, text in docstrings("diffusers"):
        parts = document_parts(text)
        blocks += len(parts)
        for f in scan_file(SourceFile(Path("example.md"), text, parts=parts), SOURCE_RULES):
            assert f.severity == "info", (file, f.line, str(f))
            notes.add(f.rule)
    assert blocks > 200
    assert notes == {"DSK020", "DSK051"}, "the old name of dtype, and code from the Hub in three examples"


def test_this_package_gives_no_finding():
    assert scan_source(ROOT / "devsky_nb") == []


# ---- programs that are hard to follow ----

def test_a_deep_expression_does_not_hide_the_rest(scan):
    deep = "x = a + b" + " + a" * 900
    found = scan(f"import transformers as t\n{deep}\nt.AutoModel.from_pretrained(x, trust_remote_code=True)\n")
    assert ("DSK051", 3) in found and set(found) <= {("DSK000", 2), ("DSK051", 3)}


def test_what_follows_a_deep_expression_keeps_its_circumstances(scan):
    deep = " + ".join(["a"] * 900)
    model = "from transformers import CLIPModel\nmodel = CLIPModel.from_pretrained(folder)\n"
    after = f"while {deep}: pass\nmodel(**batch)\n"
    assert ("DSK033", 4) not in scan(model + after), "the call is in no loop"
    assert ("DSK033", 4) in scan(model + "while a:\n  model(**batch)\n")


def test_long_chains_are_followed(scan):
    load = "import diffusers\np = diffusers.FluxPipeline.from_pretrained(x)\n"
    use = "p.enable_attention_slicing()\np.transformer.half()\nimport torch\np @ p\n"
    assert scan(load + "p = p.to('cuda')\n" * 3000 + use) == [("DSK030", 3003)]


GROWING = """\
def f(a, b): return g(a, a, b, b)
def g(a, b, c, d): return h(a, b) + h(c, d)
def h(a, b): return f(a, b) + f(b, a)
"""


def test_values_that_grow_end_in_a_limited_number_of_events(scan):
    code = "import torch\nx = torch.zeros(1)\n" + "x = f(x, x)\n" * 400 + GROWING + "f(1, 2)\n" * 50
    assert scan(code) == []
    events, _ = events_of(source_of(code))
    assert len(events) < 2_000


def test_calls_add_a_limited_number_of_events():
    body = "\n".join(["  torch.load(name)"] * 200)
    calls = "\n".join(f"read('{i}.pt')" for i in range(200))
    events, _ = events_of(source_of(f"import torch\ndef read(name):\n{body}\n{calls}\n"))
    count = len(events)
    assert 20_000 < count < 21_500, "400 in the body, 400 about its calls, and 20,000 of 40,000 in it"
    assert [e.node.lineno for e in events if e.kind == "limit"] == [303]


# ---- comments and choices ----

CALL = "import transformers as t\nt.AutoModel.from_pretrained({}\n    x,\n    trust_remote_code=True,{}\n){}\n"
COMMENTS = {"# noqa": True, "# noqa: DSK051": True, "# NOQA:E501,DSK051": True, "# noqa : E501 DSK051": True,
            "# noqa: DSK050": False, "# noqa: E501": False, "# noqasa": False, "# trusted": False}


@pytest.mark.parametrize("comment, silent", COMMENTS.items())
def test_noqa(comment, silent, scan):
    for where in range(3):
        places = [f"  {comment}" if i == where else "" for i in range(3)]
        assert scan(CALL.format(*places)) == ([] if silent else [("DSK051", 4)]), where


def test_select_and_ignore(scan):
    code = "import transformers as t\nt.AutoModel.from_pretrained('a/b', trust_remote_code=True, torch_dtype=x)"
    assert scan(code, select=["DSK05"], ignore=["DSK050"]) == [("DSK051", 2)]
    assert scan(code, select=iter(["DSK05"]), ignore=iter(["DSK050"])) == [("DSK051", 2)]
    assert {rule for rule, _ in scan(code)} == {"DSK020", "DSK050", "DSK051"}


def test_which_findings_stop_a_build(scan, tmp_path):
    scan("import transformers as t\nt.AutoModel.from_pretrained('a/b', torch_dtype=x)")
    found = scan_source(tmp_path)
    assert isinstance(found, Findings) and {f.severity for f in found} == {"info"}
    assert found.failing() == [] and [f.rule for f in found.failing(iter(["DSK050"]))] == ["DSK050"]
