"Models on a pretended GPU: what happens where it is full."
import shutil

import pytest, torch

from devsky_nb.device import memory_info, release_memory
from devsky_nb.errors import InsufficientMemoryError, ModelLoadError
from devsky_nb.hub.load import load_errors
from devsky_nb.hub.locate import locate_model
from devsky_nb.hub.registry import load_model, ModelRegistry
from devsky_nb.hub.weights import expected_bytes
from pretended_gpu import pretended

MIB = 2**20
SIZE = expected_bytes(locate_model("tiny-clip"), torch.float16)
KINDS = pytest.mark.parametrize("kind", ["cuda", "mps"])


@pytest.fixture
def registry(tmp_path): return ModelRegistry(tmp_path, max_bytes=1 << 40)  # which never evicts for its own limit


@KINDS
def test_a_model_that_does_not_fit_is_refused_with_the_sizes_and_leaves_nothing(kind, registry):
    with pretended(kind, total=2 * MIB) as gpu:
        for load in (load_model, registry.get_model):
            with pytest.raises(InsufficientMemoryError, match="tiny-clip does not fit on .*: it needs about .* are free .*out of memory") as e: load("tiny-clip")
            assert e.value.details["needed"] == SIZE and 0 < e.value.details["free"] <= e.value.details["total"] == 2 * MIB
            del e
            release_memory()
            assert gpu.used() == gpu.reserved() == 0


@KINDS
def test_what_nobody_uses_makes_room_and_what_is_leased_stays(kind, registry, tmp_path):
    same_again = shutil.copytree(locate_model("tiny-clip"), tmp_path / "same")
    with pretended(kind) as gpu, registry.lease("tiny-clip", dtype=torch.bfloat16) as leased:
        used = gpu.used()
        gpu.set_limit(used + int(1.5 * SIZE))

        def in_memory(): return [entry.key.dtype for entry in registry._memory.models.values()]
        registry.get_model("tiny-clip", dtype=torch.float16)
        registry.get_model(same_again, dtype=torch.float16)
        assert in_memory() == ["bfloat16", "float16"]
        copy = load_model("tiny-clip", dtype=torch.float16, registry=registry)  # of one's own; the registry's goes for it
        assert copy.device.type == kind and gpu.used() == pytest.approx(used + SIZE, rel=.1)
        assert leased.dtype == torch.bfloat16 and in_memory() == ["bfloat16"]


def test_models_on_another_gpu_are_not_evicted(registry):
    with pretended("cuda", count=2) as gpu:
        registry.get_model("tiny-clip", device="cuda:1")
        gpu.set_limit(2 * MIB, "cuda:0")
        with pytest.raises(InsufficientMemoryError, match="does not fit on cuda:0"): registry.get_model("tiny-clip", device="cuda:0")
        assert [entry.key.device for entry in registry._memory.models.values()] == ["cuda:1"] and gpu.used("cuda:1") > MIB


def test_a_form_that_foresees_that_it_does_not_fit_is_tried_again_only_where_something_was_evicted(registry):
    tried = []

    def load(folder, device, dtype):
        tried.append(memory_info(device).free)
        raise InsufficientMemoryError("unet needs more")

    with pretended("cuda"):
        with pytest.raises(InsufficientMemoryError, match="unet needs more"): registry.lease("tiny-clip", form="x", load=load)
        assert len(tried) == 1
        registry.get_model("tiny-clip")
        with pytest.raises(InsufficientMemoryError, match="unet needs more"): registry.lease("tiny-clip", form="x", load=load)
        assert len(tried) == 3 and tried[2] > tried[1]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("MPS backend out of memory"), MemoryError(),
                                   RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_runs_out_while_files_are_read_is_not_called_damage(error, tmp_path):
    with pytest.raises(type(error)), load_errors(torch.nn.Linear, tmp_path): raise error
    with pytest.raises(ModelLoadError, match="Save or fetch"), load_errors(torch.nn.Linear, tmp_path): raise RuntimeError("shapes differ")


@KINDS
def test_released_memory_is_given_back_to_the_device(kind):
    with pretended(kind) as gpu:
        block = torch.empty(MIB, device=kind)
        del block
        assert gpu.reserved() == 4 * MIB
        free = memory_info(kind).free
        release_memory()
        assert gpu.reserved() == 0 and (kind == "mps" or memory_info(kind).free == free)  # what torch keeps counts as free
