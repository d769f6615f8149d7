"Tables in memory: whatever library they are of, and however a column is stored, a row is an input."
import io, pickle
from contextlib import closing
from pathlib import Path

import pandas as pd, pyarrow as pa, pytest
from PIL import Image

from devsky_nb.embedding.plan import SourcePlan, TABLE
from devsky_nb.errors import ValidationError
from devsky_nb.images.frames import FrameImages
from devsky_nb.images.items import read_item
from devsky_nb.images.policy import ImagePolicy
from devsky_nb.images.sources import open_source, slices


def image(shade=0):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 90, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def items(source): return [i for s in slices(source) for i in s.items()]


def planned(source, folder, rows=2):
    "As a job stores its source and another process reads it."
    with closing(SourcePlan(folder / "plan", rows)) as plan:
        plan.fill(source)
        return [i for n in range(plan.count) for i in pickle.loads(pickle.dumps(plan.slice(n))).items()]


def polars(data): return pytest.importorskip("polars").DataFrame(data, strict=False)
def datasets(data): return pytest.importorskip("datasets").Dataset.from_dict(data)
def streamed(data): return datasets(data).to_iterable_dataset()
def shuffled(data): return datasets({k: v[::-1] for k, v in data.items()}).select(range(len(next(iter(data.values()))))[::-1])


LIBRARIES = [pd.DataFrame, pa.table, *(pytest.param(one, marks=pytest.mark.slow) for one in (polars, datasets, streamed, shuffled))]


@pytest.mark.parametrize("make", LIBRARIES)
def test_paths_addresses_and_bytes_of_every_library(make, tmp_path):
    paths = open_source(make({"sku": ["A1", "B2", "C3"], "image_path": ["a.jpg", None, "https://x.example/b.jpg?sig=1"], "price": [1., 2., 3.]}))
    assert [(i.id, i.file, i.problem and i.problem[0]) for i in items(paths)] == [
        ("a.jpg", "a.jpg", None), ("1", None, "missing"), ("https://x.example/b.jpg", "https://x.example/b.jpg?sig=1", None)]
    assert [i.id for i in items(open_source(make({"sku": [7, 8], "image_path": ["a.jpg", "b.jpg"]}), id_column="sku"))] == ["7", "8"]
    assert planned(paths, tmp_path) == items(paths) and not (tmp_path / TABLE).exists()
    by_value = open_source(make({"id": [5, 6, 7], "jpg": [image(1), image(2), None]}))
    for found in (items(by_value), planned(by_value, tmp_path)):
        assert [(i.id, i.data, i.problem and i.problem[0]) for i in found] == [("5", image(1), None), ("6", image(2), None), ("7", None, "missing")]
    assert (tmp_path / TABLE).exists()


@pytest.mark.slow
def test_images_of_hugging_face_are_read_as_they_are_stored(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "far.png").write_bytes(image(9))
    rows = {"image": [{"bytes": image(1), "path": "a.png"}, {"bytes": None, "path": str(tmp_path / "far.png")}, None], "label": [0, 1, 0]}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}))
    for source in (table, table.with_format("torch"), table.to_iterable_dataset()):
        found = planned(open_source(source), tmp_path)
        assert [i.problem[0] if i.problem else read_item(i, ImagePolicy()) for i in found] == [image(1), image(9), "missing"]
    with pytest.raises(ValidationError, match=r"since it is several: give one of them, such as source\['train'\]"): open_source(datasets.DatasetDict(train=table))
    polars = pytest.importorskip("polars")
    with pytest.raises(ValidationError, match=r"its rows are not there yet: give source.collect\(\)"): open_source(polars.LazyFrame({"path": ["a"]}))
    category = polars.DataFrame({"path": ["a.jpg", "a.jpg"]}, schema={"path": polars.Categorical}).with_row_index("id")
    assert [(i.id, i.file) for i in items(open_source(category))] == [("0", "a.jpg"), ("1", "a.jpg")]


def test_values_of_pandas_that_are_none_or_no_image():
    path = lambda *values: [(i.file, i.problem and i.problem[0]) for i in items(FrameImages(pd.DataFrame({"path": pd.Series(values, dtype=object)})))]
    assert path(Path("a/b.jpg"), float("nan"), None, pd.NA, pd.NaT, "", "c.jpg") == [("a/b.jpg", None), *[(None, "missing")] * 5, ("c.jpg", None)]
    odd = pd.DataFrame({"path": pd.Series(["a.jpg"] * 200 + [7, [1], Image.new("RGB", (2, 2))], dtype=object)})
    assert [i.problem[0] for i in items(FrameImages(odd))[-3:]] == ["broken-parquet"] * 3
    category = pd.DataFrame({"Path": pd.Categorical(["a.jpg", "b.jpg"])}, index=["x", "y"])
    assert [i.id for i in items(FrameImages(category))] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("table, column, id_column, says", [
    (pd.DataFrame({"front": ["a"], "back": ["b"]}), None, None, "no column is clearly the images'. Its columns: front"), (pd.DataFrame({"path": ["a"]}), "img", None, "no column 'img'"),
    (pd.DataFrame({"path": ["a"]}), None, "sku", "no column 'sku' for the ids"), (pd.DataFrame([["a", "b"]], columns=["path", "path"]), None, None, "no column is clearly"),
    (pd.DataFrame({"image": [Image.new("RGB", (2, 2))]}), None, None, "no column is clearly"), (pd.DataFrame(), None, None, "no column is clearly"), (pa.table({"path": [["a"]]}), None, None, "a column of lists")])
def test_tables_that_cannot_be_meant_are_one_error(table, column, id_column, says):
    with pytest.raises(ValidationError, match=says): items(open_source(table, column, id_column))


def test_addresses_and_ids_that_are_none(tmp_path):
    with pytest.raises(ValidationError, match="row 1: carrier-pigeon"): items(open_source(pd.DataFrame({"url": ["https://x.example/a", "carrier-pigeon://b"]})))
    with pytest.raises(ValidationError, match="the id 'a' is given twice"): planned(open_source(pd.DataFrame({"id": ["a", "a"], "jpg": [b"1", b"2"]})), tmp_path)
    with pytest.raises(ValidationError, match="the id 'a.jpg' is given twice"): planned(open_source(pd.DataFrame({"path": ["a.jpg", "a.jpg"]})), tmp_path)


def test_relative_paths_beside_bytes_start_where_the_caller_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(image(3))
    rows = [{"bytes": image(1), "path": "x.png"}, {"bytes": None, "path": "a.png"}]
    found = planned(open_source(pa.table({"image": rows})), tmp_path)
    monkeypatch.chdir("/")
    assert [read_item(i, ImagePolicy()) for i in found] == [image(1), image(3)]


