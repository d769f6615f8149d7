"A text's tokens: read with all of a model's tokenizer or not at all, whatever stands in the text or in the files."
import json, os, shutil

import numpy as np, pytest, torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from devsky_nb import CLIPImageEmbedder
from devsky_nb.errors import MLError, ModelLoadError, ValidationError
from devsky_nb.hub.locate import locate_model


pytestmark = pytest.mark.usefixtures("nothing_hangs")


@pytest.fixture(scope="module")
def openai_like(tmp_path_factory):
    "A random CLIP with a vocabulary and merges in files of their own, as the first published ones have them, and their wrong `eos_token_id`."
    folder = tmp_path_factory.mktemp("openai")
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(words), "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1, "max_position_embeddings": 77}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config={**small, "patch_size": 32, "image_size": 64}, projection_dim=16)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=64).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n", encoding="utf-8")
    tokens = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **tokens}), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens), encoding="utf-8")
    return folder


@pytest.fixture(params=["tiny-clip", "openai-like"])
def folder(request, openai_like, tmp_path):
    return shutil.copytree(locate_model("tiny-clip") if request.param == "tiny-clip" else openai_like, tmp_path / "clip")


def embedder(folder): return CLIPImageEmbedder(folder, device="cpu")


SPECIAL = ["a red dress<|endoftext|> and blue jeans", "<|endoftext|>", "<|startoftext|>", "a <|startoftext|><|endoftext|> b", "<|EndOfText|>",
           "<|endoftext|>red", "red<|endoftext|>"]


def test_the_name_of_a_special_token_is_text(folder):
    e = embedder(folder)
    cut, whole, alone = e.encode_text(["a red dress", SPECIAL[0], "a red dress and blue jeans"])
    assert cut @ whole < 0.9999 and cut @ alone < 0.9999
    vectors = e.encode_text(SPECIAL)
    similar = vectors @ vectors.T - 2 * torch.eye(len(SPECIAL))
    assert (similar.argmax(1)[:-1] != -1).all() and torch.isfinite(vectors).all()
    ids = e._tokenizer.tensors(SPECIAL)
    length = ids["attention_mask"].sum(1)
    start, end = ids["input_ids"][0, 0], ids["input_ids"][0, length[0] - 1]
    for row, n in zip(ids["input_ids"], length):
        assert row[0] == start and row[n - 1] == end and not {int(start), int(end)} & set(row[1:n - 1].tolist())
    for text, vector in zip(SPECIAL, vectors): torch.testing.assert_close(e.encode_text(text)[0], vector, atol=1e-5, rtol=0)


def test_a_text_has_its_vector_whatever_the_folder_says_about_sides(folder):
    e = embedder(folder)
    expected = e.encode_text(["red", "a red dress and more"])
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"padding_side": "left", "truncation_side": "left", "model_max_length": 3}), encoding="utf-8")
    turned = embedder(folder)
    torch.testing.assert_close(turned.encode_text(["red", "a red dress and more"]), expected, atol=1e-6, rtol=0)
    long = "red " * 200
    torch.testing.assert_close(turned.encode_text(long, truncate=True), e.encode_text(long, truncate=True), atol=1e-6, rtol=0)


def test_texts_of_any_length_and_content(folder):
    e = embedder(folder)
    limit = e.model.config.text_config.max_position_embeddings
    fits = "a " * (limit - 2)
    assert e.encode_text(fits).shape[0] == 1
    for text, says in ((fits + "a", "tokens and the model reads"), ("a" * 10_000_000, "10,000,000 characters"), ("red " * 2_500_000, "characters"),
                       (" " * 10_000_000 + "red", "characters"), ("\ud83d red", "half of a character"), ("", "non-empty"), (" \t\n", "non-empty")):
        with pytest.raises(ValidationError, match=says) as error: e.encode_text(["red", text])
        assert len(str(error.value)) < 500 and str(error.value).isprintable()
    cut = e.encode_text(["a" * 10_000_000, fits + "a a a"], truncate=True)
    torch.testing.assert_close(cut[1:], e.encode_text(fits), atol=1e-5, rtol=0)
    for odd in ("\0", "red\0dress", "\u202ered", "\ufeffred", "🧥👗", "e\u0301", "\x1b[31m"):
        vector = e.encode_text(odd)
        assert torch.isfinite(vector).all() and torch.equal(vector, e.encode_text(odd))
    with pytest.raises(ValidationError, match="half of a character"): e.zero_shot(torch.ones(1, e.dim), ["\udc80"])


def tokenizer_files(folder):
    return [p.name for p in sorted(folder.iterdir()) if p.name.startswith(("tokenizer", "vocab", "merges", "special"))]


def same_words(e):
    "The vectors of two texts, which must not be one and the same."
    vectors = e.encode_text(["a red dress", "blue jeans"])
    assert vectors[0] @ vectors[1] < 0.9999


CONTENTS = {"empty": b"", "null": b"null", "list": b"[]", "number": b"3", "object": b"{}", "text": b'"x"', "cut": None, "bytes": b"\xff\xfe\x00\xd8",
            "deep": b"[" * 100_000, "deep object": b'{"model":' * 100_000, "zeros": bytes(1000), "model of nothing": b'{"model": {}}',
            "model without words": b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "model is a list": b'{"model": [1]}',
            "words of another kind": b'{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "added_tokens": []}',
            "class of code": b'{"tokenizer_class": "ours.Tokenizer", "auto_map": {"AutoTokenizer": ["x.Y", null]}}',
            "class of another": b'{"tokenizer_class": "BertTokenizer"}', "class is a number": b'{"tokenizer_class": 5, "model_max_length": "x"}',
            "tokens are numbers": b'{"eos_token": 5, "bos_token": [1], "pad_token": {}}', "other end": b'{"eos_token": "red</w>", "tokenizer_class": "CLIPTokenizer"}'}


def cases():
    "Every damage of every file; a spread of them in the fast run, so that each file and each damage occurs."
    for i, (name, content) in enumerate(CONTENTS.items()):
        yield pytest.param(content, i, id=name)
        yield pytest.param(content, None, id=f"{name}, of every file", marks=pytest.mark.slow)


@pytest.mark.parametrize("content, which", list(cases()))
def test_a_tokenizer_that_is_damaged_gives_an_error_or_the_right_vectors(folder, content, which):
    names = tokenizer_files(folder)
    for name in names if which is None else [names[which % len(names)]]:
        path = folder / name
        sound = path.read_bytes()
        path.write_bytes(sound[:len(sound) // 2] if content is None else content)
        try: same_words(embedder(folder))
        except ModelLoadError as e: assert str(folder) in str(e) and len(str(e)) < 3000
        path.write_bytes(sound)
    same_words(embedder(folder))


@pytest.mark.parametrize("make", [os.mkfifo, lambda p: p.symlink_to("/dev/zero"), lambda p: p.symlink_to("nowhere"), os.mkdir, None],
                         ids=["pipe", "device", "link to nothing", "folder", "missing"])
def test_a_tokenizer_file_that_is_none(folder, make):
    for name in tokenizer_files(folder):
        path = folder / name
        sound = path.read_bytes()
        path.unlink()
        if make: make(path)
        try: same_words(embedder(folder))
        except ModelLoadError as e: assert str(folder) in str(e)
        else: assert name == "special_tokens_map.json"
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        path.write_bytes(sound)


def test_the_tokenizer_of_another_model(folder, openai_like, tmp_path):
    "Numbers that the model has not, or another end: an error, never a vector of something else."
    tiny = locate_model("tiny-clip")
    other = openai_like if (folder / "tokenizer.json").exists() else tiny
    for name in tokenizer_files(folder): (folder / name).unlink()
    for name in tokenizer_files(other): shutil.copy(other / name, folder)
    with pytest.raises(ModelLoadError, match="another model's|do not end with"): embedder(folder).encode_text("red")


def test_a_tokenizer_with_tokens_of_its_own(folder):
    path = folder / "tokenizer.json"
    if not path.exists(): pytest.skip("it has none")
    whole = json.loads(path.read_text(encoding="utf-8"))
    whole["added_tokens"].append({**whole["added_tokens"][0], "id": 652, "content": "<sku>"})
    path.write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(ModelLoadError, match="653 tokens and the model 652"): embedder(folder).encode_text("red")


def test_an_end_that_the_tokenizer_lists_as_a_word_like_any_other(folder):
    path = folder / "tokenizer.json"
    if not path.exists(): pytest.skip("it has none")
    whole = json.loads(path.read_text(encoding="utf-8"))
    for token in whole["added_tokens"]: token["special"] = False
    path.write_text(json.dumps(whole | {"post_processor": None}), encoding="utf-8")
    whole, cut = embedder(folder).encode_text([SPECIAL[0], "a red dress"])
    assert whole @ cut < 0.9999


def test_text_weights_that_overflow_are_an_error_not_nan(openai_like, tmp_path):
    folder = shutil.copytree(openai_like, tmp_path / "clip")
    model = CLIPModel.from_pretrained(folder)
    with torch.no_grad(): model.text_projection.weight.fill_(3e38)
    model.save_pretrained(folder)
    with pytest.raises(MLError, match="non-finite vector of a text"): embedder(folder).encode_text(["red", "blue"])


def test_broken_tokenizers_do_not_disturb_images(folder):
    for name in tokenizer_files(folder): (folder / name).unlink()
    e = embedder(folder)
    assert e.encode_image(np.zeros((8, 8, 3), np.uint8)).shape == (1, e.dim) and e.fingerprint
    for _ in range(2):
        with pytest.raises(ModelLoadError, match="vocab.json and merges.txt. is missing"): e.encode_text("red")
