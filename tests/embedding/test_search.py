"Search beyond its lesson: every answer equals brute force, whatever the data, the block and the place; what is wrong is said."
import os, subprocess, sys, threading, tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest, threadpoolctl, torch
from hypothesis import given, settings, strategies as st
from patience import PATIENCE

from devsky_nb.embedding.bulk import embed_images
from devsky_nb.embedding.embedder import CLIPImageEmbedder
from devsky_nb.errors import FileNotFoundError, ValidationError
from devsky_nb.demo.garments import Garment, render_garment
from devsky_nb.embedding import pairs as pairs_module
from devsky_nb.embedding.pairs import choose_width, Clusters, DisjointSets, look_alikes, principal_axes, projections, similar_pairs
from devsky_nb.embedding.precision import apply_receipt, Receipt
from devsky_nb.embedding.search import check_vectors, cosines, FolderIndex, product_margin, proposals, VectorIndex


def unit(x, dtype=np.float32):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype)


def some_vectors(rng, n, dim, kind):
    if kind == "random": return unit(rng.normal(size=(n, dim)))
    centres = rng.normal(size=(max(1, n // 20), dim))
    x = unit(centres[rng.integers(0, len(centres), n)] + rng.normal(size=(n, 1)) ** 2 * .2 * rng.normal(size=(n, dim)))
    if kind == "copies": x[rng.integers(0, n, n // 2)] = x[rng.integers(0, n, n // 2)]
    if kind == "cone": x = unit(x + 9 * np.eye(dim)[0])
    if kind == "line": x = unit(np.stack([np.cos(t := np.linspace(0, 3, n)), np.sin(t), *np.zeros((dim - 2, n))], 1))
    return x


KINDS = ("random", "clustered", "copies", "cone", "line")


def true_cosines(x, y):
    return np.stack([cosines(q, y) for q in x]) if len(x) else np.zeros((0, len(y)), np.float32)


def true_pairs(x, t):
    return np.argwhere(np.triu(true_cosines(x, x) >= np.float32(t), 1)).tolist() if len(x) else []


def found_pairs(x, t, **kw):
    return sorted(p for part in similar_pairs(x, t, **kw) for p in part.tolist())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.integers(1, 150), st.integers(2, 40), st.sampled_from(KINDS), st.integers(1, 30),
       st.integers(1, 200), st.booleans())
def test_neighbours_equal_brute_force_whatever_the_block(seed, n, dim, kind, k, block, half):
    rng = np.random.default_rng(seed)
    x = some_vectors(rng, n, dim, kind)
    if half: x = x.astype(np.float16)
    asked = unit(np.concatenate([rng.normal(size=(3, dim)), x[:2].astype(np.float32)]))
    found, scores = VectorIndex(x).search(asked, k, block=block), true_cosines(asked, x.astype(np.float32))
    order = np.lexsort((np.broadcast_to(np.arange(n), scores.shape), -scores))[:, :k]
    assert found.rows.tolist() == order.tolist() and found.ids.tolist() == order.tolist()
    assert found.scores.tobytes() == np.take_along_axis(scores, order, 1).tobytes()


@settings(max_examples=45, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.integers(0, 150), st.integers(2, 40), st.sampled_from(KINDS),
       st.sampled_from([-1, 0, .5, .9, .97, .999, 1]), st.sampled_from([4, 64, 1024]))
def test_pairs_equal_brute_force(seed, n, dim, kind, t, block):
    x = some_vectors(np.random.default_rng(seed), max(n, 1), dim, kind)[:n]
    pairs = true_pairs(x, t)
    assert found_pairs(x, t, block=block) == pairs
    sets = DisjointSets(n)
    for part in similar_pairs(x, t, sets=sets, block=block): sets.add(part)
    assert sets.groups() == DisjointSets(n).add(pairs).groups()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.sampled_from(KINDS), st.sampled_from([.5, .9, .97]), st.integers(1, 30), st.integers(5, 80))
def test_clusters_of_projections_let_every_pair_through(seed, kind, t, m, size):
    x = some_vectors(np.random.default_rng(seed), 400, 32, kind)
    z = projections(x, principal_axes(x)[:, :m])
    clusters = Clusters(z, t - product_margin(32), size)
    met = np.zeros((400, 400), bool)
    for i, j in clusters.close().tolist():
        for za, zb, a, b, diagonal in clusters.blocks(i, j, 16):
            assert (z[a] == za).all() and (z[b] == zb).all()
            inside = np.ones((len(a), len(b)), bool) if diagonal is None else np.triu(np.ones((len(a), len(b)), bool), 1 + diagonal)
            assert not (met[np.ix_(a, b)] & inside).any(), "a pair is met twice"
            met[np.ix_(a, b)] |= inside
    full = true_cosines(x, x)
    assert (z @ z.T >= full - 1e-5).all()
    assert not (np.triu(full >= np.float32(t), 1) & ~(met | met.T)).any()


@pytest.mark.parametrize("kind, dtype",
                         [("random", np.float32), ("clustered", np.float16), ("copies", np.float32), ("cone", np.float16)])
def test_pairs_of_a_set_that_is_large_enough_for_projections(kind, dtype, monkeypatch):
    monkeypatch.setattr(pairs_module, "SMALL_SET", 1000)
    x = some_vectors(np.random.default_rng(1), 5000, 96, kind).astype(dtype)
    assert kind in ("clustered", "copies") or choose_width(x, principal_axes(x), .97) < 96
    full = unit(x.astype(np.float64), np.float64)
    full = full @ full.T
    np.fill_diagonal(full, 0)
    at = np.float32(np.sort(full[:500][full[:500] < .9999999])[-40])  # the threshold is the cosine of a pair
    assert found_pairs(x, at) == np.argwhere(np.triu(full.astype(np.float32) >= at, 1)).tolist()


def test_a_pair_at_the_threshold_is_decided_by_the_kernel_alone():
    x = some_vectors(np.random.default_rng(2), 300, 64, "clustered")
    for at in np.unique(true_cosines(x, x)[np.triu_indices(300, 1)])[-40:]:
        assert found_pairs(x, float(at)) == true_pairs(x, at)
        above = np.nextafter(at, np.float32(2))
        if above <= 1: assert found_pairs(x, float(above)) == true_pairs(x, above)


def test_a_hundred_thousand_copies_are_one_group_without_five_billion_pairs():
    rng = np.random.default_rng(3)
    x = np.repeat(unit(rng.normal(size=(1, 64))), 100_000, 0)
    x[5::20_000] = unit(rng.normal(size=(5, 64)))
    sets, seen = DisjointSets(len(x)), 0
    for pairs in similar_pairs(x, .97, sets=sets):
        sets.add(pairs)
        seen += len(pairs)
    assert [len(g) for g in sets.groups()] == [99_995] and seen < 20 * len(x)
    near = unit(x[:8000] + .01 * rng.normal(size=(8000, 64)))
    assert max(map(len, look_alikes(VectorIndex(near), .97).groups)) >= 7990


def test_neighbours_among_copies_are_the_first_of_them():
    x = np.repeat(unit(np.random.default_rng(4).normal(size=(3, 16))), 5000, 0)
    assert VectorIndex(x).search(x[[0, 14_999]], 4, block=333).rows.tolist() == [[0, 1, 2, 3], [10_000, 10_001, 10_002, 10_003]]


def test_rising_scores_do_not_make_every_row_a_proposal():
    t = np.linspace(1.5, .1, 20_000)
    x = np.stack([np.cos(t), np.sin(t)], 1).astype(np.float32)
    query = np.array([[1, 0]], np.float32)
    assert VectorIndex(x).search(query, 3).rows.tolist() == [[19_999, 19_998, 19_997]]
    _, proposed = proposals(query @ x.T, np.full((1, 1), -np.inf, np.float32), 3, product_margin(2))
    assert set(proposed) >= {19_999, 19_998, 19_997} and len(proposed) < 1000


@given(st.lists(st.tuples(st.integers(0, 14), st.integers(0, 14)), max_size=20), st.integers(1, 5))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_groups_are_the_connected_components(pairs, step):
    import networkx as nx
    sets = DisjointSets(15)
    for s in range(0, len(pairs), step): sets.add(pairs[s:s + step])
    assert sets.groups() == sorted(sorted(c) for c in nx.connected_components(nx.Graph(pairs)) if len(c) > 1)


@pytest.mark.parametrize("bad", [0., np.nan, np.inf, 1.01, 1e30])
def test_rows_that_are_no_unit_vectors_are_named(bad):
    x = some_vectors(np.random.default_rng(5), 5000, 8, "random")
    x[[17, 4999]] *= np.float32(bad)
    for call in (lambda: VectorIndex(x), lambda: similar_pairs(x), lambda: VectorIndex(x[:17]).search(x[15:19])):
        with pytest.raises(ValidationError, match="not of length 1: (17, 4999|2)") as caught: call()
        assert caught.value.details["rows"] in ([17, 4999], [2])


@pytest.mark.parametrize("x", [np.zeros(3, np.float32), np.zeros((2, 2, 2), np.float32), np.eye(3), np.eye(3, dtype=int),
                               np.zeros((3, 0), np.float32),
                               np.array([["a"]]), np.empty((0, 3))])
def test_what_is_no_array_of_vectors_is_refused(x):
    with pytest.raises(ValidationError, match="float32 or float16"): check_vectors(x)


def test_nothing_and_one_have_answers():
    none, one = np.zeros((0, 4), np.float32), np.eye(1, 4, dtype=np.float32)
    assert VectorIndex(none).search(one).rows.shape == (1, 0) and VectorIndex(one).search(none).rows.shape == (0, 1)
    assert VectorIndex(one).search(one, 5).rows.tolist() == [[0]]
    for x in (none, one): assert look_alikes(VectorIndex(x)).groups == [] and not list(similar_pairs(x))
    assert repr(look_alikes(VectorIndex(none))) and VectorIndex(none).search(one)._repr_html_()


@pytest.mark.parametrize("call, says", [
    (lambda i: i.search(), "one of queries, images or texts"),
    (lambda i: i.search(np.eye(3), texts=["a"]), "one of queries, images or texts"),
    (lambda i: i.search(np.eye(4)), "queries have 4 dimensions and the vectors 3"), (lambda i: i.search("a dress"), "queries"),
    (lambda i: i.search(np.eye(3), k=True), "k=True"),
    (lambda i: i.search(np.eye(3), k=1.5), "k=1.5"), (lambda i: i.search(np.eye(3), block=0), "block=0"),
    (lambda i: look_alikes(i, "0.9"), "from -1 to 1"),
    (lambda i: look_alikes(i, 1.5), "from -1 to 1"), (lambda i: look_alikes(i, None), "from -1 to 1"),
    (lambda i: similar_pairs(i.vectors, block=0), "block=0"),
    (lambda i: VectorIndex(i.vectors, paths=["a"]), "3 vectors and 1 paths"),
    (lambda i: VectorIndex(i.vectors, ids="abc"), "3 vectors and ids='abc': give one for each"),
    (lambda i: VectorIndex(i.vectors, ids=5), "3 vectors and ids=5: give one for each"),
    (lambda i: i.search(texts="a", embedder="tiny-clip"), "embedder='tiny-clip': expected an ImageEmbedder"),
    (lambda i: look_alikes(i.vectors), "must be a VectorIndex or a FolderIndex, not ndarray"),
    (lambda i: look_alikes("vectors"), "must be a VectorIndex or a FolderIndex, not str")])
def test_a_wrong_call_is_a_typed_error(call, says):
    with pytest.raises(ValidationError, match=says): call(VectorIndex(np.eye(3, dtype=np.float32)))


@pytest.fixture(scope="module")
def tiny():
    return CLIPImageEmbedder("tiny-clip", device="cpu")


@pytest.fixture(scope="module")
def output(tmp_path_factory, tiny):
    root = tmp_path_factory.mktemp("search")
    (root / "images").mkdir()
    for i, kind in enumerate(["dress", "coat", "hat", "bag"] * 3):
        render_garment(Garment(kind, "red", "plain"), size=72, seed=i).save(root / "images" / f"{i:02}.png")
    (root / "images" / "03.png").write_bytes((root / "images" / "07.png").read_bytes())
    (root / "images" / "05.png").write_bytes(b"no image")
    embed_images(root / "images", root / "vectors", tiny, shard_rows=5)
    (root / "vectors" / ".part-00009.parquet.unfinished").write_bytes(b"torn")
    return root


def test_an_output_folder_is_searched_by_image_and_by_text(output, tiny):
    index = FolderIndex(output / "vectors")
    assert (len(index), index.dim, index.fingerprint) == (10, tiny.dim, tiny.fingerprint)
    found = index.search(images=[output / "images" / "04.png"], k=3, embedder=tiny)
    assert found.ids[0, 0] == "04.png"
    assert found.paths[0, 0] == str(output / "images" / "04.png")
    assert found.scores[0, 0] > .9999
    names = index.search(texts=["a red hat"], k=3, embedder=tiny).ids[0]
    assert sorted(names) == ["02.png", "06.png", "10.png"]
    assert found._repr_html_().count("<img") == 3


def test_a_folder_answers_as_memory_does(output):
    index = FolderIndex(output / "vectors")
    loaded = index.load()
    for block in (1, 3, 4096):
        a, b = index.search(loaded.vectors, 4, block=block), loaded.search(loaded.vectors, 4)
        assert all(getattr(a, n).tolist() == getattr(b, n).tolist() for n in ("rows", "scores", "ids", "paths"))
    assert look_alikes(index, .9).ids == look_alikes(loaded, .9).ids != []
    assert look_alikes(index, .9)._repr_html_().count("<img") == sum(map(len, look_alikes(index, .9).ids))


def test_a_folder_is_an_index_with_vectors_ids_and_paths(output, monkeypatch):
    index, memory = FolderIndex(output / "vectors"), FolderIndex(output / "vectors").load()
    reads, real = [], FolderIndex._read
    monkeypatch.setattr(FolderIndex, "_read", lambda self, group, columns, rows=65536: reads.append(columns)
                        or real(self, group, columns, rows))
    assert not {"vectors", "_all_names"} & set(vars(index)), "nothing is read before it is asked for"
    for _ in range(2):
        assert np.array_equal(index.vectors, memory.vectors) and index.vectors.shape == (10, index.dim)
        assert index.ids.tolist() == memory.ids.tolist() == index.names(np.arange(10))[0].tolist()
        assert index.paths.tolist() == memory.paths.tolist()
        assert found_pairs(index.vectors, .9) == found_pairs(memory.vectors, .9)
    assert sum(columns == ["embedding"] for columns in reads) == len(index.groups), "read once, and kept"
    whole = VectorIndex(index.vectors, index.ids, index.paths, index.fingerprint)
    assert whole.search(index.vectors, 3).ids.tolist() == index.search(index.vectors, 3).ids.tolist()


def test_vectors_of_a_faithful_backend_may_be_asked_by_the_exact_embedder(tmp_path, output, tiny):
    receipt = Receipt("bf16-torch", None, "because", tiny.fingerprint, "cpu", 64)
    half = apply_receipt(tiny, receipt)
    embed_images(output / "images", tmp_path / "half", half)
    index = FolderIndex(tmp_path / "half")
    assert (index.fingerprint, index.reference) == (half.fingerprint, tiny.fingerprint) != (tiny.fingerprint, None)
    for asked in (index, index.load()):
        for embedder in (tiny, half):
            assert asked.search(images=[output / "images" / "04.png"], k=1, embedder=embedder).ids[0, 0] == "04.png"
        with pytest.raises(ValidationError, match="cosines mean nothing"):
            asked.search(images=[output / "images" / "04.png"], embedder=CLIPImageEmbedder("tiny-clip", device="cpu", output="cls"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_queries_of_every_float_type(output, dtype):
    index = FolderIndex(output / "vectors")
    asked = torch.from_numpy(index.vectors[3]).to(dtype)
    if dtype == torch.bfloat16: asked = torch.nn.functional.normalize(asked.float(), dim=0)
    assert index.search(asked, 1).rows.tolist() == [[3]]


def write(path, x, mark="made-by-a", type=pa.float32(), **columns):
    data = {"id": [f"{path.stem}-{i}" for i in range(len(x))], "path": [None] * len(x), "status": ["embedded"] * len(x), **columns}
    schema = {k: pa.string() for k in data}
    values = pa.FixedSizeListArray.from_arrays(pa.array(np.asarray(x, type.to_pandas_dtype()).ravel(), type), x.shape[1])
    table = pa.table([pa.array(v, schema[k]) for k, v in data.items()] + [values], [*data, "embedding"])
    pq.write_table(table.replace_schema_metadata({"devsky_nb.fingerprint": mark} if mark else {}), path, row_group_size=37,
                   compression="zstd")


def test_float16_shards_with_many_row_groups_and_none(tmp_path):
    x = some_vectors(np.random.default_rng(6), 200, 16, "clustered").astype(np.float16)
    write(tmp_path / "a.parquet", x[:100], type=pa.float16())
    write(tmp_path / "b.parquet", x[:0], type=pa.float16())
    write(tmp_path / "c.parquet", x[100:150], type=pa.float16(), status=["error"] * 50)
    write(tmp_path / "d.parquet", x[100:], type=pa.float16())
    index, asked = FolderIndex(tmp_path), x[::7].astype(np.float32)
    a, b = index.search(unit(asked), 9, block=10), VectorIndex(x).search(unit(asked), 9)
    assert a.rows.tolist() == b.rows.tolist() and a.scores.tobytes() == b.scores.tobytes()
    assert a.ids[0, 0] == "a-0" and index.names(np.array([[199, 100]]))[0].tolist() == [["d-99", "d-0"]]
    assert index.load().vectors.dtype == np.float16


def test_vectors_that_do_not_belong_together_are_refused(tmp_path, tiny):
    write(tmp_path / "a.parquet", np.eye(4, tiny.dim))
    with pytest.raises(ValidationError, match="made by made-by-a and the embedder is projected"):
        FolderIndex(tmp_path).search(texts=["a hat"], embedder=tiny)
    for x, mark, type in ((np.eye(4, tiny.dim), "made-by-b", pa.float32()), (np.eye(4), "made-by-a", pa.float32()),
                          (np.eye(4, tiny.dim), "made-by-a", pa.float16())):
        write(tmp_path / "b.parquet", x, mark, type)
        with pytest.raises(ValidationError, match="two models in two folders"): FolderIndex(tmp_path)


def test_files_that_are_no_output_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*none"): FolderIndex(tmp_path / "none")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": ["a"]}), path)
    with pytest.raises(ValidationError, match="no output of embed_images"): FolderIndex(tmp_path)
    write(path, np.eye(4), mark="")
    with pytest.raises(ValidationError, match="no output of embed_images"): FolderIndex(tmp_path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValidationError, match="cannot read .*a.parquet"): FolderIndex(tmp_path)


def test_damage_inside_a_file_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, some_vectors(np.random.default_rng(11), 200, 64, "random"))
    data = bytearray(path.read_bytes())
    index = FolderIndex(tmp_path)
    for s in range(3000, len(data) - 4000, 40): data[s] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValidationError, match="a.parquet"): index.search(np.eye(1, 64))


def test_a_folder_that_changes_under_the_search_is_noticed(tmp_path):
    write(tmp_path / "a.parquet", np.eye(50))
    index = FolderIndex(tmp_path)
    write(tmp_path / "a.parquet", np.eye(50)[:49])
    with pytest.raises(ValidationError, match="changed while it was read|cannot read"): index.search(np.eye(50)[:1])
    os.unlink(tmp_path / "a.parquet")
    with pytest.raises(ValidationError, match="cannot read"): index.search(np.eye(50)[:1])
    bad = np.eye(50)
    bad[41] = 0
    write(tmp_path / "a.parquet", bad)
    with pytest.raises(ValidationError, match="a.parquet: 1 of .* 41"): FolderIndex(tmp_path).search(np.eye(50)[:1])


def test_the_search_of_a_folder_holds_a_block_and_not_the_folder(tmp_path):
    x = some_vectors(np.random.default_rng(7), 8000, 128, "random")  # 4 MB
    for i in range(4): write(tmp_path / f"{i}.parquet", x[i * 2000:(i + 1) * 2000])
    index = FolderIndex(tmp_path)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    for part in index.blocks(256): assert part.nbytes <= 256 * 512 and pa.total_allocated_bytes() - before < 2e6
    index.search(x[:10], block=256)
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


def test_a_memory_map_is_searched_without_being_read_whole(tmp_path):
    x = some_vectors(np.random.default_rng(8), 5000, 32, "copies")
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert isinstance(VectorIndex(mapped).vectors, np.memmap)
    assert found_pairs(mapped, .97) == found_pairs(x, .97) != []


def test_answers_do_not_depend_on_threads():
    code = """
import hashlib, numpy as np
from devsky_nb.embedding import pairs
from devsky_nb.embedding.search import VectorIndex
pairs.SMALL_SET = 999
rng = np.random.default_rng(9)
x = rng.normal(size=(6000, 64)).astype("f4")
x[3000:] = x[:3000] + .2 * x[:3000][::-1]
x /= np.linalg.norm(x, axis=1, keepdims=True)
found = VectorIndex(x).search(x[:50], 7)
p = sorted(tuple(row) for part in pairs.similar_pairs(x, .98) for row in part.tolist())
print(len(p), hashlib.sha256(found.rows.tobytes() + found.scores.tobytes() + repr(p).encode()).hexdigest())
"""
    answers = {subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": n, "OPENBLAS_NUM_THREADS": n},
                              capture_output=True, text=True,
                              check=True).stdout for n in "12"}
    assert len(answers) == 1 and int(answers.pop().split()[0]) > 100


def blas_threads(): return [lib["num_threads"] for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "blas"]


def test_searches_beside_one_another_and_given_up_leave_the_process_as_it_was():
    x = some_vectors(np.random.default_rng(10), 5000, 64, "copies")
    with threadpoolctl.threadpool_limits(2, "blas"):
        expected = found_pairs(x, .99)
        with ThreadPoolExecutor(3) as pool: assert all(p == expected for p in pool.map(lambda _: found_pairs(x, .99), range(3)))
        started = similar_pairs(x, .99)
        next(started)
        assert found_pairs(x, .99) == expected
        started.close()
        assert set(blas_threads()) == {2}
        assert not [t for t in threading.enumerate() if t.name.startswith("devsky-pairs")]


def test_between_two_results_the_callers_products_have_all_their_threads():
    x = some_vectors(np.random.default_rng(12), 5000, 64, "copies")
    inside = set()
    def condition(a, b):
        inside.update(blas_threads())
        return np.ones((len(a), len(b)), bool)
    with threadpoolctl.threadpool_limits(2, "blas"):
        held = [set(blas_threads()) for _ in similar_pairs(x, .9, condition=condition)]
        assert len(held) > 3 and all(threads == {2} for threads in held)
        assert inside == {1}


def test_the_many_small_products_have_one_thread_each(monkeypatch):
    seen, passing = [], pairs_module.PairSearch.passing
    def watched(self, meeting):
        seen.append(set(blas_threads()))
        return passing(self, meeting)
    monkeypatch.setattr(pairs_module.PairSearch, "passing", watched)
    x = some_vectors(np.random.default_rng(12), 5000, 64, "copies")
    with threadpoolctl.threadpool_limits(2, "blas"):
        for _ in similar_pairs(x, .9): pass
    assert seen and all(threads == {1} for threads in seen)


def test_an_interrupt_ends_a_long_search_at_once():
    "What is under way is finished, nothing else is begun, and no thread stays."
    code = """
import os, signal, threading, numpy as np
from devsky_nb.embedding import pairs as search
x = np.random.default_rng(0).normal(size=(20_000, 64)).astype("f4")
x /= np.linalg.norm(x, axis=1, keepdims=True)
begun, real = [], search.Clusters.blocks
def blocks(*args):
    for block in real(*args):
        begun.append(1)
        yield block
search.Clusters.blocks = blocks
def all_pairs(condition):
    begun.clear()
    for pairs in search.similar_pairs(x, .6, condition=condition): pass
def every(a, b): return np.ones((len(a), len(b)), bool)
def interrupted(a, b):
    os.kill(os.getpid(), signal.SIGINT)
    return every(a, b)
all_pairs(every)
print(len(begun))
try: all_pairs(interrupted)
except KeyboardInterrupt: print(len(begun), [t.name for t in threading.enumerate() if t.name.startswith("devsky-pairs")])
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"},
                          capture_output=True, text=True, timeout=PATIENCE)
    whole, begun, threads = done.stdout.split(maxsplit=2)
    assert threads == "[]\n" and int(begun) < int(whole) / 2, done.stdout


@pytest.mark.parametrize("vectors", [[[1., 0.], [0., 1.]], "vectors.npy", None, torch.eye(2)])
def test_pairs_are_looked_for_in_arrays(vectors):
    with pytest.raises(ValidationError, match="must be a NumPy array"): similar_pairs(vectors)
