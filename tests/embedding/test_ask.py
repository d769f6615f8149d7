"A data set asked by words and by images: with the model that it names, as a table, as data and as a page."
import contextlib, io, json, re, shlex, shutil, subprocess
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq, pytest
from PIL import Image

import devsky_nb
from devsky_nb import Garment, ImageEmbedder, ImagePolicy, ModelRegistry, embed_images, render_garment, search_images
from devsky_nb.cli import main, make_parser
from devsky_nb.embedding import ask
from devsky_nb.embedding.search import FolderIndex
from devsky_nb.errors import DevSkyyError, FileNotFoundError, ModelNotFoundError, ValidationError

SCRIPT = "<script>alert('x')</script>.png".replace("/", "∕")


@pytest.fixture(scope="module")
def tiny():
    with ImageEmbedder("tiny-clip", device="cpu", precision="fp32") as embedder: yield embedder


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny):
    "A data set of 11 images, one of which is broken and one a copy; nobody changes it."
    root = tmp_path_factory.mktemp("ask")
    (root / "shop").mkdir()
    for i, kind in enumerate(["dress", "coat", "hat", "bag"] * 2):
        render_garment(Garment(kind, "red", "plain"), size=72, seed=i).save(root / "shop" / f"{i:02}.png")
    shutil.copy(root / "shop" / "02.png", root / "shop" / "copy.png")
    render_garment(Garment("dress", "blue", "plain"), size=72, seed=9).save(root / "shop" / SCRIPT)
    (root / "shop" / "broken.png").write_bytes(b"no image")
    embed_images(root / "shop", root / "vectors", tiny, shard_rows=4)
    return root


@pytest.fixture
def out(made, tmp_path):
    "A copy of it, to be spoiled."
    shutil.copytree(made / "vectors", tmp_path / "vectors")
    return tmp_path / "vectors"


def note(out, **notes):
    "Other metadata in all shards of a data set; None takes one away."
    for path in out.glob("*.parquet"):
        table = pq.read_table(path)
        metadata = table.schema.metadata | {f"devsky_nb.{k}".encode(): v.encode() for k, v in notes.items() if v is not None}
        for name, value in notes.items():
            if value is None: metadata.pop(f"devsky_nb.{name}".encode(), None)
        pq.write_table(table.replace_schema_metadata(metadata), path)


def test_the_answers_are_those_of_the_index(made, tiny):
    image = made / "shop" / "01.png"
    found = search_images(made / "vectors", ["a red hat", "a bag"], [image], k=4, device="cpu")
    index = FolderIndex(made / "vectors")
    by_text, by_image = index.search(texts=["a red hat", "a bag"], k=4, embedder=tiny), index.search(images=[image], k=4, embedder=tiny)
    assert found.neighbours.ids.tolist() == by_text.ids.tolist() + by_image.ids.tolist()
    data = found.to_dict()
    assert json.loads(json.dumps(data)) == data and (data["model"], data["vectors"], data["k"]) == ("tiny-clip", 9, 4)
    assert [list(q)[0] for q in data["queries"]] == ["text", "text", "image"] and data["queries"][2]["neighbours"][0] == {
        "rank": 1, "id": "01.png", "path": str(image), "score": 1.0}
    assert found._repr_html_().count("<img") == 12 and "a red hat\n  0." in repr(found)
    everything = search_images(made / "vectors", "a hat", device="cpu").neighbours
    assert everything.rows.shape == (1, 9), "fewer than ten are no error, unless ten are asked for"


@pytest.mark.parametrize("call, error, says", [
    (dict(), ValidationError, "nothing was asked"),
    (dict(texts=[]), ValidationError, "texts must be"),
    (dict(texts=" "), ValidationError, "texts must be"),
    (dict(texts=7), ValidationError, "texts must be"),
    (dict(texts="a", k=10), ValidationError, "k=10: .* has 9 vectors"),
    (dict(texts="a", k=0), ValidationError, "k=0"),
    (dict(texts="a", k=True), ValidationError, "k=True"),
    (dict(images="none.png"), FileNotFoundError, "none.png"),
    (dict(images=b"no image"), ValidationError, "no image|cannot identify|unknown"),
    (dict(images=[None]), ValidationError, "NoneType"),
    (dict(images=[]), ValidationError, "nothing was asked"),
    (dict(texts="a", model="no-such-model-anywhere"), ValidationError, "no model 'no-such-model-anywhere'"),
    (dict(texts="a", model="tiny-sdxl"), ValidationError, "tiny-sdxl"),
    (dict(texts="a", device="tpu"), ValidationError, "tpu"),
])
def test_a_question_that_cannot_be_answered_is_a_typed_error(made, call, error, says):
    with pytest.raises(error, match=says): search_images(made / "vectors", **call)


def test_a_data_set_that_is_not_finished_is_not_asked(out, tmp_path):
    def asked(folder=out): return search_images(folder, "a hat", device="cpu")
    with pytest.raises(FileNotFoundError, match="no folder"): asked(tmp_path / "none")
    with pytest.raises(ValidationError, match="expected a path"): asked("")
    (tmp_path / "begun" / ".devsky").mkdir(parents=True)
    with pytest.raises(ValidationError, match="unfinished data set"): asked(tmp_path / "begun")
    (out / ".devsky").mkdir(exist_ok=True)
    (out / ".devsky" / "commit.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValidationError, match="is just being replaced"): asked()
    (out / ".devsky" / "commit.json").unlink()
    assert asked()
    (out / "part-00001.parquet").unlink()
    with pytest.raises(ValidationError, match="is damaged"): asked()
    (out / "_SUCCESS").unlink()
    with pytest.raises(ValidationError, match="has no _SUCCESS"): asked()


def test_what_the_data_set_says_of_its_model_is_checked(out, made, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(Path(devsky_nb.__file__).parent / "models" / "tiny-clip", other)
    config = json.loads((other / "preprocessor_config.json").read_text(encoding="utf-8"))
    (other / "preprocessor_config.json").write_text(json.dumps(config | {"image_mean": [.5, .5, .5]}), encoding="utf-8")
    note(out, model=str(other))
    for question in (dict(texts="a hat"), dict(images=made / "shop" / "01.png")):
        with pytest.raises(ValidationError, match="cosines mean nothing"): search_images(out, device="cpu", **question)
        assert search_images(out, device="cpu", model="tiny-clip", **question).model == "tiny-clip"
    note(out, model=None)
    with pytest.raises(ValidationError, match="does not say which model"): search_images(out, "a hat", device="cpu")
    for ground in ("[1, 2]", "{", '"red"', "[1, 2, 300]", "[[[[[1]]]]]"):
        note(out, model="tiny-clip", background=ground)
        with pytest.raises(ValidationError): search_images(out, "a hat", device="cpu")


def test_texts_are_compared_with_the_vectors_as_they_are(out, made, tiny):
    "The half of the model that reads texts is the same, whatever computed the images."
    expected = search_images(made / "vectors", "a hat", device="cpu").neighbours.ids.tolist()
    content = tiny.fingerprint.rpartition("-")[2]
    note(out, fingerprint=f"projected-int9-analog-{content}")
    assert search_images(out, "a hat", device="cpu").neighbours.ids.tolist() == expected
    with pytest.raises(DevSkyyError): search_images(out, images=made / "shop" / "01.png", device="cpu")
    note(out, receipt=json.dumps({"reference": tiny.fingerprint}))
    assert search_images(out, images=made / "shop" / "01.png", k=1, device="cpu").neighbours.ids.tolist() == [["01.png"]]
    note(out, fingerprint=f"cls-fp32-torch-{content}", receipt=None)
    with pytest.raises(ValidationError): search_images(out, "a hat", device="cpu")


def test_vectors_that_were_asked_for_in_half_precision_are_asked_in_it(tmp_path, made):
    embed_images(made / "shop", tmp_path / "v", ImageEmbedder("tiny-clip", device="cpu", precision="bf16"))
    found = search_images(tmp_path / "v", "a red hat", made / "shop" / "01.png", k=2, device="cpu").neighbours
    assert found.ids[1, 0] == "01.png" and search_images(tmp_path / "v", "a red hat", k=2, device="cpu").neighbours.ids[0].tolist() == found.ids[0].tolist()


@pytest.mark.parametrize("output", ["cls", "pooled"])
def test_vectors_of_another_output_are_asked_by_images(tmp_path, made, output):
    embed_images(made / "shop", tmp_path / "v", ImageEmbedder("tiny-clip", device="cpu", output=output, precision="fp32"))
    assert search_images(tmp_path / "v", images=made / "shop" / "01.png", k=1, device="cpu").neighbours.ids[0, 0] == "01.png"
    with pytest.raises(ValidationError, match="projected"): search_images(tmp_path / "v", "a hat", device="cpu")


def test_a_model_that_reads_no_texts_is_said(tmp_path, made):
    from transformers import CLIPVisionModelWithProjection
    tiny = Path(devsky_nb.__file__).parent / "models" / "tiny-clip"
    CLIPVisionModelWithProjection.from_pretrained(tiny).save_pretrained(tmp_path / "seeing")
    shutil.copy(tiny / "preprocessor_config.json", tmp_path / "seeing")
    embed_images(made / "shop", tmp_path / "v", ImageEmbedder(tmp_path / "seeing", device="cpu", precision="fp32"))
    assert search_images(tmp_path / "v", images=made / "shop" / "01.png", k=1, device="cpu").neighbours.ids[0, 0] == "01.png"
    with pytest.raises(ValidationError, match="no text"): search_images(tmp_path / "v", "a hat", device="cpu")


def test_the_ground_behind_transparent_images_is_that_of_the_data_set(tmp_path, made):
    clear = Image.new("RGBA", (72, 72), (200, 0, 0, 60))
    clear.save(tmp_path / "clear.png")
    shutil.copy(made / "shop" / "01.png", tmp_path / "solid.png")
    policy = ImagePolicy(background=(0, 90, 0))
    (tmp_path / "in").mkdir()
    for name in ("clear.png", "solid.png"): shutil.move(tmp_path / name, tmp_path / "in" / name)
    embed_images(tmp_path / "in", tmp_path / "v", ImageEmbedder("tiny-clip", device="cpu", policy=policy, precision="fp32"))
    assert search_images(tmp_path / "v", images=tmp_path / "in" / "clear.png", k=1, device="cpu").neighbours.scores[0, 0] > .9999


def test_the_commit_of_the_data_set_is_asked_for_and_not_a_later_one(tmp_path, made):
    from hubcache import make_repo
    tiny = Path(devsky_nb.__file__).parent / "models" / "tiny-clip"
    files = {p.name: p.read_bytes() for p in tiny.iterdir() if p.suffix in (".json", ".safetensors", ".txt")}
    config = json.loads(files["preprocessor_config.json"])
    newer = files | {"preprocessor_config.json": json.dumps(config | {"image_mean": [.4, .4, .4]}).encode()}
    old, new = "a" * 40, "b" * 40
    make_repo(tmp_path / "hub", "shop/clip", {old: files, new: newer}, {"main": new})
    embedder = ImageEmbedder("shop/clip", device="cpu", cache_dir=tmp_path / "hub", revision=old, precision="fp32")
    embed_images(made / "shop", tmp_path / "v", embedder)
    assert FolderIndex(tmp_path / "v").notes["revision"] == old
    assert search_images(tmp_path / "v", "a hat", device="cpu", cache_dir=tmp_path / "hub").model == "shop/clip"
    with pytest.raises(ValidationError, match="cosines mean nothing"):
        search_images(tmp_path / "v", "a hat", device="cpu", cache_dir=tmp_path / "hub", revision="main")
    with pytest.raises(ModelNotFoundError): search_images(tmp_path / "v", "a hat", device="cpu", registry=ModelRegistry(tmp_path / "no", offline=True))


class Page(HTMLParser):
    "What is in a page."
    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_data(self, data): self.words.append(data)


def page_of(report, path): return Page(report.to_html(path).read_text(encoding="utf-8"))


def test_the_page_is_one_file_and_escapes_what_it_shows(made, tmp_path):
    found = search_images(made / "vectors", ["<img src=x onerror=alert(1)>", "a blue dress"], made / "shop" / "01.png", k=9, device="cpu")
    page = page_of(found, tmp_path / "new" / "page.html")
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 28 and all(a["src"].startswith("data:image/webp;base64,") for a in images), "27 answers and the image that was asked"
    assert not {"script", "link", "iframe", "a"} & {tag for tag, _ in page.tags} and not any("onerror" in attrs for _, attrs in page.tags)
    assert SCRIPT in page.words and any(a["alt"] == SCRIPT for a in images)
    text = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert "http" not in text and "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_an_image_that_is_gone_is_said_in_its_place(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    embed_images("shop", "relative", ImageEmbedder("tiny-clip", device="cpu", precision="fp32"))
    (tmp_path / "copy" / "shop" / "01.png").unlink()
    (tmp_path / "copy" / "shop" / "02.png").write_bytes(b"replaced")
    found = search_images("relative", "a hat", k=9, device="cpu")
    page = page_of(found, "page.html")
    assert sum(tag == "img" for tag, _ in page.tags) == 7
    assert page.words.count("no file at this path") == 1 and page.words.count("cannot be read any more") == 1
    assert any("1 of 9 images cannot be shown" in words for words in page.words)
    monkeypatch.chdir(tmp_path)
    page = page_of(search_images("copy/relative", "a hat", k=9, device="cpu"), "page.html")
    assert any("9 of 9 images cannot be shown" in words for words in page.words), "paths count from where embed ran"
    outside = page_of(search_images(made / "vectors", "a hat", k=9, device="cpu", root=tmp_path), "page.html")
    assert outside.words.count("outside the allowed folder") == 9
    monkeypatch.setattr(ask, "MOST_THUMBNAILS", 4)
    few = page_of(search_images(made / "vectors", ["a hat", "a bag"], k=5, device="cpu"), "page.html")
    assert sum(tag == "img" for tag, _ in few.tags) == 4 and few.words.count("not shown: there are too many") == 6


def test_a_path_that_is_an_address_is_not_fetched(out, tmp_path, monkeypatch):
    import socket
    for path in out.glob("*.parquet"):
        table = pq.read_table(path)
        paths = ["https://shop.example/a.jpg" for _ in range(len(table))]
        pq.write_table(table.set_column(1, table.schema.field(1), [paths]), path)
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("it went to the network"))
    page = page_of(search_images(out, "a hat", k=2, device="cpu"), tmp_path / "page.html")
    assert not any(tag == "img" for tag, _ in page.tags)


def devsky(*args):
    "Run the command in this process, as a terminal would see it."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: status = main([*map(str, args)])
        except SystemExit as e: status = e.code
    return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())


def test_the_command_answers_people_and_programs(made, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    done = devsky("search", made / "vectors", "a red hat", "-k", 2, "--html", tmp_path / "p.html", "a bag", "--device", "cpu")
    assert done.returncode == 0 and done.stdout.index("a red hat") < done.stdout.index("a bag") and "score" in done.stdout, done.stderr
    assert "02.png" in done.stdout and done.stderr == f"written: {tmp_path / 'p.html'}\n" and (tmp_path / "p.html").stat().st_size > 5000
    done = devsky("search", made / "vectors", "--image", made / "shop" / "01.png", "--json", "-k", 1, "--device", "cpu")
    assert json.loads(done.stdout)["queries"][0]["neighbours"][0]["id"] == "01.png" and done.stderr == ""


@pytest.mark.parametrize("args, says", [
    (["OUT"], "nothing was asked"),
    (["OUT", ""], "an empty text"),
    (["OUT", "a", "-k", "99"], "has 9 vectors"),
    (["OUT", "--image", "none.png"], "none.png"),
    (["none", "a"], "no folder"),
    (["OUT", "a", "--html", "."], "it is a folder"),
    (["OUT", "a", "--nonsense"], "unrecognized arguments: --nonsense"),
])
def test_wrong_calls_exit_with_2_and_one_line(made, tmp_path, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    done = devsky("search", *(made / "vectors" if a == "OUT" else a for a in args), "--device", "cpu")
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_the_help_has_examples_that_parse(capsys):
    for command in ("search", "export"):
        with pytest.raises(SystemExit): main([command, "--help"])
        examples = re.findall(r"^  devsky (.*)$", capsys.readouterr().out.partition("examples:")[2], re.M)
        assert len(examples) >= 4
        for example in examples: assert make_parser().parse_args(shlex.split(example)).command == command
