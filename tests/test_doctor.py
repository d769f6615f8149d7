"The doctor on code of every kind: what it must find, what it must leave alone, and files that are no code at all."
import contextlib, importlib.util, io, json, os, re, shutil, stat, subprocess, sys, tempfile, time
from pathlib import Path

import nbformat, pytest, yaml
from hubcache import make_repo
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from devsky_nb import environment
from devsky_nb.cli import main
from devsky_nb.doctor import RULES, SKIPPED, check_environment, fix_source, scan_file, scan_source
from devsky_nb.errors import FileNotFoundError, ValidationError
from devsky_nb.source import Source, document_parts

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def scan(tmp_path):
    "Scan a piece of code, and say which rules apply in which lines."
    def run(code, name="code.py", **kwargs):
        (tmp_path / name).write_text(code, encoding="utf-8")
        return [(f.rule, f.line) for f in scan_source(tmp_path / name, **kwargs)]
    return run


# what is found, and what is not

@pytest.mark.parametrize("code", sorted(RULES))
def test_each_rule_finds_its_wrong_example_and_leaves_the_right_one(code, scan):
    assert code in {rule for rule, _ in scan(RULES[code].wrong)}
    assert scan(RULES[code].right) == []
    assert re.fullmatch(r"DSK0\d\d", code) and RULES[code].why.endswith(".")


PIPELINE = "import torch\nfrom diffusers import StableDiffusionXLPipeline as P, BitsAndBytesConfig\nimport transformers\nimport diffusers as d\n"


@pytest.mark.parametrize("way", [
    "P.from_pretrained(x, quantization_config=BitsAndBytesConfig(load_in_8bit=True))",
    "kw = dict(quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True)); P.from_pretrained(x, **kw)",
    "kw = {'variant': 'fp16'}; kw['quantization_config'] = BitsAndBytesConfig(load_in_8bit=True); P.from_pretrained(x, **kw)",
    "kw = {}; kw.update(quantization_config=BitsAndBytesConfig(load_in_8bit=True)); P.from_pretrained(x, **kw)",
    "kw = {'a': 1} | {'quantization_config': BitsAndBytesConfig(load_in_8bit=True)}; P.from_pretrained(x, **{**kw})",
    "def c(**k): return BitsAndBytesConfig(**k)\nP.from_pretrained(x, quantization_config=c(load_in_8bit=True))",
    "def c():\n  r = BitsAndBytesConfig(load_in_8bit=True)\n  return r\ndef load(): return P.from_pretrained(x, quantization_config=c())",
    "def load(config): return P.from_pretrained(x, quantization_config=config)\nload(BitsAndBytesConfig(load_in_8bit=True))",
    "def load(**kw): return P.from_pretrained(x, **kw)\nload(quantization_config=BitsAndBytesConfig(load_in_8bit=True))",
    "class A:\n  config = BitsAndBytesConfig(load_in_8bit=True)\n  def load(self): return P.from_pretrained(x, quantization_config=self.config)",
    "class A:\n  def load(self): return P.from_pretrained(x, quantization_config=self.config)\n  def __init__(self): self.config = BitsAndBytesConfig(load_in_8bit=True)",
    "class A:\n  def __init__(self, c): self.c = c\n  def load(self): return P.from_pretrained(x, quantization_config=self.make())\n  def make(self): return BitsAndBytesConfig(load_in_8bit=True)",
    "class B(P): pass\nB.from_pretrained(x, quantization_config=BitsAndBytesConfig(load_in_8bit=True))",
    "L = P.from_pretrained\nL(x, quantization_config=BitsAndBytesConfig(load_in_8bit=True))",
    "from functools import partial\nL = partial(P.from_pretrained, quantization_config=BitsAndBytesConfig(load_in_8bit=True))\nL(x)",
    "c = BitsAndBytesConfig(load_in_8bit=True) if small else None\nP.from_pretrained(x, quantization_config=c)",
    "c = None\nif small:\n  c = BitsAndBytesConfig(load_in_8bit=True)\nP.from_pretrained(x, quantization_config=c)",
    "try:\n  from diffusers import FluxPipeline as F\nexcept ImportError:\n  F = None\nF.from_pretrained(x, quantization_config=BitsAndBytesConfig(load_in_8bit=True))",
    "d.pipelines.flux.FluxPipeline.from_pretrained(x, quantization_config=d.quantizers.quantization_config.BitsAndBytesConfig(load_in_8bit=True))",
    "import importlib\nm = importlib.import_module('diffusers')\nm.FluxPipeline.from_pretrained(x, quantization_config=BitsAndBytesConfig(load_in_8bit=True))",
    "(c := BitsAndBytesConfig(load_in_8bit=True)); P.from_pretrained(x, quantization_config=c)",
    "c, other = BitsAndBytesConfig(load_in_8bit=True), 1\nP.from_pretrained(x, quantization_config=c)",
    "async def f():\n  async with g() as h:\n    await h(P.from_pretrained(x, quantization_config=BitsAndBytesConfig(load_in_8bit=True)))",
])
def test_a_configuration_is_followed_on_every_way_to_a_pipeline(way, scan):
    assert {rule for rule, _ in scan(PIPELINE + way)} == {"DSK010"}


@pytest.mark.parametrize("code", [
    "class P:\n  @classmethod\n  def from_pretrained(cls, *a, **k): ...\nfrom diffusers import BitsAndBytesConfig\nP.from_pretrained(x, quantization_config=BitsAndBytesConfig(load_in_8bit=True))",
    "from diffusers import FluxPipeline, BitsAndBytesConfig\nc = BitsAndBytesConfig(load_in_8bit=True)\nc = make()\nFluxPipeline.from_pretrained(x, quantization_config=c)",
    "from diffusers import FluxTransformer2DModel as M, BitsAndBytesConfig\nM.from_pretrained(x, quantization_config=BitsAndBytesConfig(load_in_8bit=True))",
    "from transformers import BitsAndBytesConfig as B\nB(load_in_4bit=four, load_in_8bit=not four, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype='bfloat16')",
    "import diffusers\ndef c(four):\n  if four: return dict(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype='bfloat16')\n  return dict(load_in_8bit=True)\n"
    "diffusers.PipelineQuantizationConfig(quant_backend='bitsandbytes_8bit', quant_kwargs=c(x), components_to_quantize=['unet'])",
    "import diffusers, torch\ndiffusers.PipelineQuantizationConfig(quant_mapping={'unet': diffusers.TorchAoConfig('int8wo')})",
    "from transformers import AutoModel\nAutoModel.from_pretrained(x, dtype='float16')\nAutoModel.from_pretrained(x, dtype='auto')",
    "import torch\nfrom transformers import AutoModel, BitsAndBytesConfig as B\nm = AutoModel.from_pretrained(x, quantization_config=B(load_in_8bit=True) if q else None)\nm = m if q else m.half()",
    "import torch\nfrom transformers import AutoModel\nmodel = AutoModel.from_pretrained(x)\nmodel.half().to(torch.bfloat16)\nimage = image.half().float()",
    "import torch\nfrom diffusers import AutoencoderKLWan as V, WanPipeline as W\nW.from_pretrained(x, vae=V.from_pretrained(x, subfolder='vae', dtype=torch.float32), dtype=torch.bfloat16)",
    "import torch, diffusers as d\nvae = d.AutoencoderKL.from_pretrained(x).to(torch.float16)\nd.StableDiffusionXLPipeline.from_pretrained(x, vae=vae, dtype=torch.float16)",
    "from diffusers import DiffusionPipeline as D\nD.from_pretrained(x).to('mps').enable_attention_slicing()",
    "class Mine:\n  def enable_vae_tiling(self): ...\n  def run(self): self.enable_vae_tiling()",
    "import torch\nfrom transformers import CLIPModel\nmodel = CLIPModel.from_pretrained(x)\n@torch.no_grad()\ndef embed(b): return model.get_image_features(**b)\nfor b in bs: embed(b)",
    "import torch\nfrom transformers import CLIPModel\nmodel = CLIPModel.from_pretrained(x)\ndef embed(b): return model(**b)\nwith torch.inference_mode():\n  for b in bs: embed(b)",
    "from transformers import CLIPModel, CLIPProcessor\nmodel, p = CLIPModel.from_pretrained(x), CLIPProcessor.from_pretrained(x)\nfor b in bs:\n  loss = model(**p(b), return_loss=True).loss\n  loss.backward()",
    "from transformers import CLIPModel\nmodel = CLIPModel.from_pretrained(x)\no = model(**inputs)\nprint(o.logits_per_image, o.image_embeds @ o.text_embeds.T)",
    "from transformers import CLIPModel\nmodel = CLIPModel.from_pretrained(x)\na = model.get_image_features(**i).pooler_output\na /= a.norm(dim=-1, keepdim=True)\nb = a.cpu().numpy()\nb @ b.T",
    "from transformers import CLIPModel\nimport torch.nn.functional as F\nmodel = CLIPModel.from_pretrained(x)\nF.cosine_similarity(model.get_image_features(**i).pooler_output, model.get_text_features(**t).pooler_output)",
    "from transformers import BertModel\nBertModel.from_pretrained(x)(**i).last_hidden_state[:, 0]",
    "from transformers import CLIPModel, CLIPTextModelWithProjection as W\nCLIPModel.from_pretrained(x).text_model\nW.from_pretrained(x).text_model",
    "import torch\ntorch.load('x.pt')\ntorch.load('x.pt', weights_only=True)",
    "import pickle, json\npickle.load(open('session.cache', 'rb'))\njson.load(open('x.pt'))",
    "from transformers import CLIPModel\nCLIPModel.from_pretrained('./models/clip')\nCLIPModel.from_pretrained('models/clip')\nCLIPModel.from_pretrained('/data/a/b')\nCLIPModel.from_pretrained(name)\n"
    "CLIPModel.from_pretrained('openai/clip', revision='v1.0')\nCLIPModel.from_pretrained('openai/clip', revision=commit)",
    "try: x = int(text)\nexcept: x = 0\nimport torch",
    "import torch, huggingface_hub\ntry: n = torch.cuda.device_count(); huggingface_hub.whoami()\nexcept Exception: pass",
    "import torch\nfrom transformers import AutoModel\ntry: m = AutoModel.from_pretrained(x)\nexcept:\n  clean(); raise",
    "from transformers import AutoModel\ntry: m = AutoModel.from_pretrained(x)\nexcept Exception as e: raise MLError('failed', original_error=e)",
    "from transformers import AutoModel\ntry: m = AutoModel.from_pretrained(x)\nexcept Exception:\n  logger.exception('failed')\n  raise MLError('failed')",
    "import os\nos.environ['HF_HOME'] = '/x'\nimport transformers\nos.environ['HF_TOKEN'] = t\nos.environ['TOKENIZERS_PARALLELISM'] = 'false'",
    "from typing import TYPE_CHECKING\nimport os\nif TYPE_CHECKING: import transformers\nos.environ['HF_HOME'] = '/x'",
    "import os\ndef late():\n  import transformers\ndef early(): os.environ['HF_HOME'] = '/x'",
    "import os, accelerate, torch\nos.environ['HF_HOME'] = '/x'",
    "def from_pretrained(*a, **k): ...\nfrom_pretrained('a/b', trust_remote_code=False, torch_dtype='x', load_in_4bit=True)",
])
def test_right_code_is_left_alone(code, scan):
    assert scan(code) == []


@pytest.mark.parametrize("code, expected", [
    ("from os import environ as e\nimport transformers\ne['HF_HOME'] = 'x'\ne.update({'HF_HUB_OFFLINE': '1'})\ne |= {'HF_ENDPOINT': 'y'}", [("DSK001", 3), ("DSK001", 4), ("DSK001", 5)]),
    ("import os\nif x:\n  from diffusers import A\nos.putenv('HF_HOME', 'x')", [("DSK001", 4)]),
    ("import transformers, os\ndef setup(): os.environ.setdefault('HF_HOME', 'x')\nsetup()", [("DSK001", 2)]),
    ("import os\ndef use():\n  import transformers\nuse()\nos.environ['HF_HOME'] = 'x'", [("DSK001", 5)]),
    ("import diffusers\nq = diffusers.PipelineQuantizationConfig('bitsandbytes_8bit', {'x': 1}, ['unet'])", [("DSK012", 2)]),
    ("import diffusers\ndef load(dtype='float16'): return diffusers.FluxPipeline.from_pretrained(x, dtype=dtype)", [("DSK022", 2)]),
    ("import transformers\ntransformers.pipeline('image-classification', model='a/b', torch_dtype='auto')", [("DSK050", 2), ("DSK020", 2)]),
    ("import torch\nfrom transformers import AutoModel as A, BitsAndBytesConfig as B\nm = A.from_pretrained(x, quantization_config=B(load_in_8bit=True)).eval()\nm.to('cuda')\nm.to('cuda', torch.float16)\nm.bfloat16()",
     [("DSK024", 5), ("DSK024", 6)]),
    ("import torch\nfrom transformers import CLIPModel\nm = CLIPModel.from_pretrained(x)\ndef one(b): return m(**b)\ndef all(bs): return [one(b) for b in bs]", [("DSK033", 4)]),
    ("import numpy as np\nfrom transformers import CLIPVisionModelWithProjection as C\nm = C.from_pretrained(x)\na = m(**i).image_embeds.detach().cpu().numpy()\nnp.dot(a, q)", [("DSK042", 5)]),
    ("import faiss\nfrom transformers import CLIPModel\nm = CLIPModel.from_pretrained(x)\nindex = faiss.IndexFlatIP(512)\nindex.add(m.get_image_features(**i).pooler_output.numpy())", [("DSK042", 5)]),
    ("import torch\nfrom transformers import CLIPModel\nm = CLIPModel.from_pretrained(x)\nf = m.get_text_features(**i)\ntorch.nn.functional.normalize(f)", [("DSK043", 5)]),
    ("import diffusers\nprint(diffusers.CLIPTextModel)", [("DSK040", 2)]),
    ("import torch, diffusers as d\np = d.StableDiffusionXLPipeline.from_pretrained(x, dtype=torch.float16)\np.vae.to(torch.float32)", [("DSK023", 3)]),
    ("import torch, diffusers as d\nu = d.UNet2DConditionModel.from_pretrained(x, dtype=torch.float16)\nparts = {'unet': u, 'vae': d.AutoencoderKL.from_pretrained(x)}\nd.StableDiffusionXLPipeline(**parts)", [("DSK023", 4)]),
    ("import diffusers as d\nq = d.PipelineQuantizationConfig('bitsandbytes_8bit', {'load_in_8bit': True}, ['unet'])\np = d.DiffusionPipeline.from_pretrained(x, quantization_config=q)\np.unet.half()\np.vae.half()", [("DSK024", 4)]),
    ("from transformers import CLIPModel\nm = CLIPModel.from_pretrained(x)\ndef cos(a, b): return (a * b).sum(-1)\ncos(m.get_image_features(**i).pooler_output, m.get_text_features(**t).pooler_output)", [("DSK042", 3)]),
    ("import diffusers as d\nd.StableDiffusionXLPipeline.from_pretrained(x).text_encoder.text_model", [("DSK044", 2)]),
    ("import torch\ndef f(unet): unet.enable_cache(None)", [("DSK032", 2)]),
    ("import pickle\nwith open('clip.pkl', 'rb') as f: m = pickle.load(f)\nn = pickle.load(model_file)", [("DSK052", 2), ("DSK052", 3)]),
    ("import joblib\njoblib.load('model.joblib')", [("DSK052", 2)]),
    ("try:\n  model = load_model(x)\nexcept BaseException:\n  model = None\nimport torch", [("DSK060", 3)]),
    ("try:\n  model = load_model(x)\nexcept Exception:\n  raise MLError('failed')\nimport torch", [("DSK061", 4)]),
    ("from transformers import AutoModel\ntry:\n  AutoModel.from_pretrained(x)\nexcept Exception as e:\n  raise E('x') from None", [("DSK061", 5)]),
])
def test_wrong_code_is_found_in_its_line(code, expected, scan):
    assert scan(code) == expected


# the user's document, and the libraries' own

PRACTICES = {
    32: "DSK001",  # HF_HOME, after the import of transformers
    33: "DSK002",  # TRANSFORMERS_CACHE
    93: "DSK014",  # no components_to_quantize
    109: "DSK020", 207: "DSK020", 213: "DSK020", 221: "DSK020", 231: "DSK020", 237: "DSK020", 247: "DSK020", 253: "DSK020", 317: "DSK020", 400: "DSK020",  # torch_dtype
    308: "DSK015",  # no bnb_4bit_quant_type
    316: "DSK010",  # BitsAndBytesConfig given to a pipeline
    405: "DSK030",  # enable_attention_slicing
    714: "DSK041",  # last_hidden_state[:, 0, :]
}


def test_the_document_gives_the_findings_that_the_facts_justify_and_no_others():
    assert {f.line: f.rule for f in scan_source(ROOT / "tests" / "practices.md")} == PRACTICES


def test_the_document_corrected_gives_none(tmp_path):
    text = (ROOT / "tests" / "practices.md").read_text(encoding="utf-8")
    head = 'import os\nfrom transformers import CLIPVisionModel, CLIPImageProcessor\n\n# Set cache directory\nos.environ["HF_HOME"] = "/app/.cache/huggingface"\nos.environ["TRANSFORMERS_CACHE"] = "/app/.cache/transformers"\n'
    for old, new in ((head, 'import os\nos.environ["HF_HOME"] = "/app/.cache/huggingface"\n\nfrom transformers import CLIPVisionModel, CLIPImageProcessor\n'),
                     ('"bnb_4bit_use_double_quant": True,\n            }\n', '"bnb_4bit_use_double_quant": True,\n            },\n            components_to_quantize=["unet", "text_encoder", "text_encoder_2"]\n'),
                     ("bnb_config = BitsAndBytesConfig(\n    load_in_4bit=True,\n    bnb_4bit_compute_dtype=torch.float16\n)", "bnb_config = None"),
                     ("        self.pipeline.enable_attention_slicing()\n", ""), ("outputs.last_hidden_state[:, 0, :]", "outputs.image_embeds"), ("CLIPVisionModel.from", "CLIPVisionModelWithProjection.from")):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "practices.md").write_text(text, encoding="utf-8")
    assert {f.rule for f in fix_source(tmp_path / "practices.md")} == {"DSK020"}
    assert scan_source(tmp_path / "practices.md") == []


def test_blocks_of_a_document_share_names_and_not_imports(scan):
    document = ("```python\nimport transformers as t\nmodel = t.CLIPVisionModel.from_pretrained(x)\n```\n\n```python\nimport os\nos.environ['HF_HOME'] = '/x'\n```\n\n```py\nmodel(**i).last_hidden_state[:, 0, :]\n```\n")
    assert scan(document, "doc.md") == [("DSK041", 12)]


def docstrings(package):
    "Every example in the docstrings of an installed package, with the file that it is in."
    folder = Path(importlib.util.find_spec(package).origin).parent
    for file in sorted(folder.glob("pipelines/**/*.py")):
        for text in re.findall(r'^EXAMPLE_DOC_STRING\w* = (?:\(\n)?\s*r?"""(.*?)"""', file.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE): yield file.relative_to(folder), text


def test_the_documentation_examples_of_diffusers_give_no_warning():
    blocks, notes = 0, set()
    for file, text in docstrings("diffusers"):
        parts = document_parts(text)
        blocks += len(parts)
        for f in scan_file(Source(Path("example.md"), text, parts=parts), set(RULES)):
            assert f.severity == "info", (file, f.line, str(f))
            notes.add(f.rule)
    assert blocks > 200
    assert notes == {"DSK020", "DSK051"}, "the old name of dtype, and code from the Hub in three examples"


# notebooks, magics, comments

def test_a_notebook_is_one_program_and_findings_name_the_cell(tmp_path):
    nb = new_notebook(cells=[new_markdown_cell("# x"), new_code_cell("%load_ext autoreload\n!pip install -q diffusers \\\n   transformers\nfiles = !ls"), new_code_cell("%%bash\nrm -rf /"),
                             new_code_cell("%%time\nimport transformers as t\nt.CLIPModel?"), new_code_cell("# no code\n\n%env HF_HOME=/data"), new_code_cell("x = await f()\nimport os; os.environ['HF_HOME'] = 'x'")])
    nbformat.write(nb, tmp_path / "a.ipynb")
    assert [(f.rule, f.cell, f.line) for f in scan_source(tmp_path / "a.ipynb")] == [("DSK001", 5, 3), ("DSK001", 6, 2)]


def test_a_broken_cell_does_not_hide_the_others(tmp_path):
    nbformat.write(new_notebook(cells=[new_code_cell("def f(:"), new_code_cell("import transformers as t\nt.AutoModel.from_pretrained(x, trust_remote_code=True)")]), tmp_path / "a.ipynb")
    found = scan_source(tmp_path / "a.ipynb")
    assert [(f.rule, f.cell, f.line) for f in found] == [("DSK000", 1, 1), ("DSK051", 2, 2)] and "cell 1 is not Python" in found[0].message


CALL = "import transformers as t\nt.AutoModel.from_pretrained({}\n    x,\n    trust_remote_code=True,{}\n){}\n"


@pytest.mark.parametrize("comment, silent", [("  # noqa", True), ("  # noqa: DSK051", True), ("  # NOQA:E501,DSK051", True), ("  # noqa : E501 DSK051", True), ("  # noqa: DSK050", False),
                                             ("  # noqa: E501", False), ("  # noqasa", False), ("  # trusted", False)])
def test_noqa(comment, silent, scan):
    for place in ((comment, "", ""), ("", comment, ""), ("", "", comment)):
        assert scan(CALL.format(*place)) == ([] if silent else [("DSK051", 4)]), place


def test_select_and_ignore(scan):
    code = "import transformers as t\nt.AutoModel.from_pretrained('a/b', trust_remote_code=True, torch_dtype=x)"
    assert scan(code, select=["DSK05"], ignore=["DSK050"]) == [("DSK051", 2)]
    assert {r for r, _ in scan(code)} == {"DSK020", "DSK050", "DSK051"}
    with pytest.raises(ValidationError, match="no rule 'DSK9'"): scan(code, select=["DSK9"])


# what is no code

@pytest.mark.parametrize("name, data, says", [
    ("a.py", b"def f(:\n  pass\n", "not Python"), ("a.py", b"x = 1\ny = '\xff\xfe'\n", "not utf-8: byte 0xff"), ("a.py", b"# coding: klingon\n", "no usable encoding"),
    ("a.py", b"x = 1\0", "null bytes"), ("a.py", b"(" * 10_000, "nested"), ("a.py", b"x = " + b"-" * 200_000 + b"1", "nested too deeply"), ("a.py", b"#" * 3_000_000, "too large"),
    ("a.ipynb", b"", "no notebook"), ("a.ipynb", b"[]", "no list of cells"), ("a.ipynb", b'{"cells": 3}', "no list of cells"), ("a.ipynb", b'{"cells": [{"cell_type": "code", "source": 3}]}', "not text"),
    ("a.ipynb", b"[" * 200_000, "nested too deeply"), ("a.ipynb", b'{"cells": [\xff]}', "not utf-8"), ("a.md", b"# x\n\n```python\ndef f(:\n```\n", "this block is not Python"), ("a.md", b"\x80", "not utf-8"),
])
def test_what_cannot_be_read_is_a_finding(name, data, says, tmp_path):
    (tmp_path / name).write_bytes(data)
    [finding] = scan_source(tmp_path / name)
    assert finding.rule == "DSK000" and says in finding.message and finding.fix
    assert fix_source(tmp_path / name) == [] and (tmp_path / name).read_bytes() == data


def test_other_oddities_of_notebooks_are_no_findings(tmp_path):
    for i, text in enumerate(('{"cells": []}', '{"cells": [null, {"cell_type": "raw"}], "metadata": []}', '{"cells": [{"cell_type": "code", "source": "x <- 3"}], "metadata": {"kernelspec": {"language": "R"}}}')):
        (tmp_path / f"{i}.ipynb").write_text(text, encoding="utf-8")
    assert scan_source(tmp_path) == []


def test_a_deep_expression_does_not_hide_the_rest(scan):
    code = "import transformers as t\nx = " + " + ".join("ab") + " + a" * 900 + "\nt.AutoModel.from_pretrained(x, trust_remote_code=True)\n"
    found = scan(code)
    assert ("DSK051", 3) in found and set(found) <= {("DSK000", 2), ("DSK051", 3)}


def test_long_chains_are_followed(scan):
    code = "import diffusers\np = diffusers.FluxPipeline.from_pretrained(x)\n" + "p = p.to('cuda')\n" * 3000 + "p.enable_attention_slicing()\np.transformer.half()\nimport torch\np @ p\n"
    assert scan(code) == [("DSK030", 3003)]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are bytes")
def test_names_and_texts_that_are_no_unicode(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.py")).write_text(SHOP, encoding="utf-8")
    (tmp_path / "a.ipynb").write_text('{"cells": [{"cell_type": "code", "source": "x = \'\\ud800\'"}]}')
    for form in ("text", "json", "sarif", "github"):
        done = devsky(".", "--source", "--format", form, cwd=tmp_path)
        assert done.returncode == 1 and "DSK000" in done.stdout and "DSK051" in done.stdout and done.stdout.encode()
    assert devsky(".", "--source", "--fix", cwd=tmp_path).stderr == ".: 1 fixed\n"


def test_values_that_grow_do_not_cost_time(scan):
    doubling = "import torch\nx = torch.zeros(1)\n" + "x = f(x, x)\n" * 400 + "def f(a, b): return g(a, a, b, b)\ndef g(a, b, c, d): return h(a, b) + h(c, d)\ndef h(a, b): return f(a, b) + f(b, a)\n" + "f(1, 2)\n" * 50
    start = time.process_time()
    assert scan(doubling) == [] and time.process_time() - start < 5


@pytest.mark.skipif(os.name == "nt", reason="POSIX files")
def test_odd_files_in_a_folder(tmp_path):
    (tmp_path / "ring").symlink_to(tmp_path)
    (tmp_path / "self.py").symlink_to(tmp_path / "self.py")
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "folder.py").mkdir()
    for skipped in sorted(SKIPPED): (tmp_path / skipped).mkdir(); (tmp_path / skipped / "bad.py").write_text("def f(:")
    (tmp_path / "my_env").mkdir(); (tmp_path / "my_env" / "pyvenv.cfg").touch(); (tmp_path / "my_env" / "bad.py").write_text("def f(:")
    (tmp_path / "z.py").write_text("def f(:")
    found = scan_source(tmp_path)
    assert [(f.rule, Path(f.path).name) for f in found] == [("DSK000", n) for n in ("gone.py", "pipe.py", "self.py", "z.py")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read(tmp_path):
    (tmp_path / "a").mkdir(); (tmp_path / "a").chmod(0)
    (tmp_path / "b.py").write_text("x = 1"); (tmp_path / "b.py").chmod(0)
    assert [f.message for f in scan_source(tmp_path)] == ["this file cannot be read: Permission denied"] * 2
    (tmp_path / "a").chmod(0o700)


def test_a_missing_path_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"): scan_source(tmp_path / "no")


def test_nothing_is_executed_or_imported(tmp_path, scan):
    code = f"import os, sys\nopen({str(tmp_path / 'ran')!r}, 'w')\nimport torch, no_such_module\nraise SystemExit"
    assert scan(code) == [] and not (tmp_path / "ran").exists()
    done = subprocess.run([sys.executable, "-c", f"import sys; from devsky_nb.doctor import scan_source; scan_source({str(ROOT / 'devsky_nb' / 'clip.py')!r}); "
                           "print({'torch', 'transformers', 'diffusers', 'huggingface_hub', 'numpy'} & set(sys.modules))"], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_this_package_gives_no_finding():
    assert scan_source(ROOT / "devsky_nb") == []


# fixes

FIXABLE = """\
import torch as th
from diffusers import (DiffusionPipeline,   # odd   spacing
    StableDiffusionXLPipeline)
pipe = DiffusionPipeline.from_pretrained(x, "é", torch_dtype = 'float16' ,  # é
                                         safety_checker=None)
pipe.enable_vae_tiling();  pipe . disable_vae_slicing ( )
"""
FIXED = FIXABLE.replace("torch_dtype = 'float16'", "dtype = th.float16").replace("pipe.enable_vae_tiling()", "pipe.vae.enable_tiling()").replace("disable_vae_slicing ( )", "vae.disable_slicing ( )")


@pytest.mark.parametrize("encode", [lambda t: t.encode(), lambda t: b"\xef\xbb\xbf" + t.encode(), lambda t: t.replace("\n", "\r\n").encode(), lambda t: t.replace("\n", "\r").encode(),
                                    lambda t: ("# -*- coding: latin-1 -*-\n" + t).encode("latin-1"), lambda t: t.rstrip("\n").encode()], ids=["plain", "bom", "crlf", "cr", "latin-1", "no end"])
def test_a_fix_changes_what_it_names_and_nothing_else(encode, tmp_path):
    file = tmp_path / "a.py"
    file.write_bytes(encode(FIXABLE))
    file.chmod(0o751)
    assert [f.rule for f in fix_source(file)] == ["DSK020", "DSK022", "DSK031", "DSK031"]
    assert file.read_bytes() == encode(FIXED)
    assert stat.S_IMODE(file.stat().st_mode) == 0o751 and [p.name for p in tmp_path.iterdir()] == ["a.py"]
    before = file.stat().st_mtime_ns
    assert fix_source(file) == [] and file.stat().st_mtime_ns == before and scan_source(file) == []


@pytest.mark.parametrize("style", [dict(indent=1, ensure_ascii=False), dict(indent=4, ensure_ascii=True), dict(separators=(",", ":"))])
@pytest.mark.parametrize("as_lines", [True, False])
def test_a_fix_leaves_the_rest_of_a_notebook_alone(style, as_lines, tmp_path):
    cells = [new_markdown_cell("torch_dtype=é"), new_code_cell(FIXABLE, id="keep-me", outputs=[nbformat.v4.new_output("stream", text="torch_dtype 😀\n")]), new_code_cell("%time pipe.enable_vae_slicing()")]
    nb = json.loads(nbformat.writes(new_notebook(cells=cells)))
    for c in nb["cells"]: c["source"] = "".join(c["source"]) if not as_lines else "".join(c["source"]).splitlines(keepends=True)
    file = tmp_path / "a.ipynb"
    text = json.dumps(nb, **style) + "\n\n"
    file.write_text(text, encoding="utf-8")
    assert len(fix_source(file)) == 4
    after = file.read_text(encoding="utf-8")
    nb["cells"][1]["source"] = FIXED if not as_lines else FIXED.splitlines(keepends=True)
    assert after == json.dumps(nb, **style) + "\n\n"
    assert fix_source(file) == []


def test_a_fix_in_a_document(tmp_path):
    quoted = "Text `torch_dtype=x`.\n\n- item:\n\n  ```python\n" + "".join(f"  {l}\n" for l in FIXABLE.splitlines()) + "  ```\n\n```py\n>>> import diffusers as d\n>>> d.FluxPipeline.from_pretrained(\n...     x, torch_dtype=y\n... )\n```\n"
    (tmp_path / "a.md").write_text(quoted, encoding="utf-8")
    assert len(fix_source(tmp_path / "a.md")) == 5
    expected = quoted.replace(FIXABLE.splitlines()[3], FIXED.splitlines()[3]).replace(FIXABLE.splitlines()[5], FIXED.splitlines()[5]).replace("x, torch_dtype=y", "x, dtype=y")
    assert (tmp_path / "a.md").read_text(encoding="utf-8") == expected


def test_a_diff_can_be_applied_with_patch(tmp_path):
    file = tmp_path / "a.py"
    file.write_text(FIXABLE, encoding="utf-8")
    for f in scan_source(file): assert f.diff == "" or f.diff.splitlines()[2].startswith(f"@@ -{f.line} +{f.line} @@")
    if shutil.which("patch"):
        first = next(f for f in scan_source(file) if f.rule == "DSK020")
        subprocess.run(["patch", "-p0", str(file)], input=first.diff + "\n", encoding="utf-8", check=True, capture_output=True)
        assert "dtype = 'float16'" in file.read_text(encoding="utf-8") and "torch_dtype" not in file.read_text(encoding="utf-8")


def test_a_file_with_an_unreadable_part_is_not_fixed(tmp_path):
    nbformat.write(new_notebook(cells=[new_code_cell(FIXABLE), new_code_cell("def f(:")]), tmp_path / "a.ipynb")
    before = (tmp_path / "a.ipynb").read_bytes()
    assert fix_source(tmp_path / "a.ipynb") == [] and (tmp_path / "a.ipynb").read_bytes() == before


def test_a_link_is_fixed_where_it_leads(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.py").write_text(FIXABLE, encoding="utf-8")
    (tmp_path / "b.py").symlink_to(tmp_path / "real" / "a.py")
    assert fix_source(tmp_path / "b.py") and (tmp_path / "b.py").is_symlink() and (tmp_path / "real" / "a.py").read_text(encoding="utf-8") == FIXED


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text(FIXABLE, encoding="utf-8")
    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValidationError, match="No space left on device. Nothing was changed"): fix_source(tmp_path / "a.py")
    assert (tmp_path / "a.py").read_text(encoding="utf-8") == FIXABLE and len(list(tmp_path.iterdir())) == 1


# what is written

SHOP = "import diffusers\npipe = diffusers.FluxPipeline.from_pretrained('a/b', torch_dtype=dtype, trust_remote_code=True)\n"


def devsky(*args, cwd):
    "Run `devsky doctor` in this process, as a terminal in that folder would see it."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: status = main(["doctor", *map(str, args)])
        except SystemExit as e: status = e.code
    return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())


def test_sarif_has_what_github_requires(tmp_path):
    (tmp_path / os.fsdecode("ä b.py".encode())).write_text(SHOP + SHOP.splitlines()[1] + "\n", encoding="utf-8")
    (tmp_path / "bad.py").write_text("def f(:")
    nbformat.write(new_notebook(cells=[new_code_cell(SHOP)]), tmp_path / "a.ipynb")
    done = devsky(".", "--source", "--format", "sarif", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    log = json.loads(done.stdout)
    assert log["version"] == "2.1.0" and log["$schema"].endswith("sarif-2.1.0.json")
    [run] = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert run["tool"]["driver"]["name"] and [r["id"] for r in rules] == sorted(r["id"] for r in rules)
    for r in rules: assert r["shortDescription"]["text"] and r["fullDescription"]["text"] and r["help"]["text"] and r["defaultConfiguration"]["level"] in ("none", "note", "warning", "error")
    for r in run["results"]:
        assert rules[r["ruleIndex"]]["id"] == r["ruleId"] and r["message"]["text"] and r["level"] in ("note", "warning", "error")
        place = r["locations"][0]["physicalLocation"]
        assert re.fullmatch(r"[\w./%-]+", place["artifactLocation"]["uri"]) and place["region"]["startLine"] >= 1 and place["region"]["startColumn"] >= 1
    prints = [r["partialFingerprints"]["devskyDoctor/v1"] for r in run["results"]]
    assert len(prints) == len(set(prints)) == 10
    notebook = (tmp_path / "a.ipynb").read_text(encoding="utf-8").splitlines()
    lines = [r["locations"][0]["physicalLocation"]["region"]["startLine"] for r in run["results"] if "ipynb" in r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]]
    assert all("from_pretrained" in notebook[n - 1] for n in lines) and lines


def test_github_annotations_cannot_be_forged(tmp_path):
    evil = tmp_path / "a,title=x::b%0A.py"
    evil.write_text(SHOP, encoding="utf-8")
    done = devsky(evil.name, "--source", "--format", "github", "--select", "DSK051", cwd=tmp_path)
    assert done.stdout.startswith("::warning file=a%2Ctitle=x%3A%3Ab%250A.py,line=2,col=") and done.stdout.count("\n") == 1


def test_exit_status_and_streams(tmp_path):
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "note.py").write_text("import transformers as t\nt.AutoModel.from_pretrained('a/b')\n")
    (tmp_path / "bad.py").write_text(SHOP, encoding="utf-8")
    status = lambda *a: devsky(*a if "--environment" in a else ("--source", *a), cwd=tmp_path).returncode
    assert status("good.py") == 0 and status("note.py") == 0 and status("bad.py") == 1 and status() == 1 and status("good.py", "bad.py") == 1
    assert status("note.py", "--select", "DSK050") == 1 and status("bad.py", "--ignore", "DSK051,DSK050", "--ignore", "DSK020") == 0
    for wrong in (["no-such.py"], ["--select", "E501"], ["--select", ""], ["--environment", "."], ["--format", "xml"], ["--budget", "much", "--plan", "tiny-clip", "--environment"]):
        assert status(*wrong) == 2, wrong
    assert {f["rule"] for f in json.loads(devsky("--source", "--json", "bad.py", cwd=tmp_path).stdout)} == {"DSK020", "DSK050", "DSK051"}
    assert "-pipe" in devsky("--source", "--diff", "bad.py", cwd=tmp_path).stdout and (tmp_path / "bad.py").read_text(encoding="utf-8") == SHOP
    fixed = devsky("--source", "--fix", "bad.py", cwd=tmp_path)
    assert fixed.stderr == "bad.py: 1 fixed\n" and "torch_dtype" not in (tmp_path / "bad.py").read_text(encoding="utf-8")
    assert "DSK111" in devsky("--rules", cwd=tmp_path).stdout


def test_the_hook_is_a_command_that_exists(tmp_path):
    [hook] = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    assert {"id", "name", "entry", "language", "types_or"} <= set(hook)
    (tmp_path / "a.py").write_text("x = 1\n")
    assert hook["entry"].split()[:2] == ["devsky", "doctor"] and devsky(*hook["entry"].split()[2:], "a.py", cwd=tmp_path).returncode == 0


# the machine

def told(code, *args, **kwargs): return [(f.severity, f.message) for f in check_environment(*args, select=[code], **kwargs)]


def test_every_finding_about_the_machine_has_a_remedy(tmp_path):
    found = check_environment(tmp_path, ignore=["DSK111"])
    assert {f.rule for f in found} == set(environment.CHECKS) - {"DSK111"} and all(f.fix and f.message and f.severity in ("pass", "info", "warning", "error") for f in found)


def test_versions_that_do_not_go_together(monkeypatch):
    real = environment.metadata.version
    monkeypatch.setattr(environment.metadata, "version", lambda name: "0.1.0" if name in ("huggingface_hub", "huggingface-hub") else real(name))
    assert any(s == "error" and "needs huggingface" in m and "0.1.0 is installed" in m for s, m in told("DSK101"))


def test_the_cache_and_why_it_is_there(tmp_path, monkeypatch):
    code = "from devsky_nb.doctor import check_environment as c; print(*[(f.severity, f.message) for f in c(select=['DSK102'])], sep='\\n')"
    run = lambda **env: subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)} | env).stdout
    assert "no variable is set" in run() and f"{tmp_path}/.cache/huggingface/hub" in run()
    assert "x/hub: HF_HOME is set" in run(HF_HOME=str(tmp_path / "x"))
    both = run(HF_HOME=str(tmp_path / "x"), HF_HUB_CACHE=str(tmp_path / "y"), TRANSFORMERS_CACHE="/z")
    assert "y: HF_HUB_CACHE is set" in both and "TRANSFORMERS_CACHE=/z is read by no library" in both and both.count("'warning'") == 2


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(**kwargs): raise OSError(30, "Read-only file system")
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert told("DSK103", tmp_path) == [("error", f"{tmp_path} cannot be written: Read-only file system")]


def test_broken_blobs_and_bare_pins(tmp_path, monkeypatch):
    old, new = "a" * 40, "b" * 40
    repo = make_repo(tmp_path, "shop/model", {old: {"config.json": b"{}"}, new: {"model.safetensors": b"1" * 5000}}, {"main": new})
    assert [s for s, _ in told("DSK105", tmp_path)] == ["pass"]
    assert told("DSK106", tmp_path) == [("info", "shop/model at aaaaaaaa has no ref: `hf cache prune` would delete it")]
    (tmp_path.parent / f"{tmp_path.name}-models.lock.json").write_text(json.dumps({"models": {"clip": [{"stage": "production", "commit": old, "repo_id": "shop/model", "patterns": [], "locked_at": "now"}]}}))
    [pin] = check_environment(tmp_path, select=["DSK106"])
    assert pin.severity == "warning" and pin.fix == f"`devsky cache pin shop/model {old} clip` keeps it"
    blob = max((repo / "blobs").iterdir(), key=lambda p: p.stat().st_size)
    blob.write_bytes(b"1" * 4999 + b"2")
    (repo / "blobs" / "x.incomplete").write_bytes(b"half")
    found = told("DSK105", tmp_path)
    assert any("damaged" in m and "model.safetensors" in m for s, m in found) and any("did not end" in m for s, m in found)
    monkeypatch.setattr(environment, "READ_AT_MOST", -1)
    (repo / "snapshots" / new / "model.safetensors").unlink(); (repo / "snapshots" / new / "model.safetensors").symlink_to("../../blobs/gone")
    found = told("DSK105", tmp_path)
    assert any("did not end" in m for s, m in found) and any("the link leads nowhere" in m for s, m in found) and "reads every byte" in found[-1][1]


def test_processors_kernels_and_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "processor_flags", lambda: {"avx512_bf16"})
    monkeypatch.setattr(environment.metadata, "version", lambda name: "1.0")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert told("DSK109")[0][0] == "info" and told("DSK110")[0][0] == "warning"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert told("DSK110")[0][0] == "pass"
    monkeypatch.setattr(environment, "processor_flags", lambda: {"avx2"})
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert told("DSK109")[0][0] == told("DSK110")[0][0] == "pass"
    assert told("DSK108", model="clip-vit-large", budget="512MiB")[0][0] == "error"


def test_a_round_trip_in_4_bits_really_runs(monkeypatch):
    [(severity, message)] = told("DSK111")
    assert severity == "pass" and "runs and reads back the same on c" in message
    monkeypatch.setattr(environment, "ROUND_TRIP", "raise SystemExit('no kernel for this processor')")
    assert told("DSK111") == [("error", "a 4-bit layer failed: no kernel for this processor")]
