"A pipeline's way of offload has the planner's name for it."
from types import SimpleNamespace

import pytest
import torch

from devsky_nb.diffusion.turns import group_way, offload_of
from devsky_nb.memory.offload import OFFLOADS


@pytest.mark.parametrize("name", [name for name, way in OFFLOADS.items() if way.level])
def test_every_way_of_groups_has_its_own_name(name):
    way = OFFLOADS[name]
    config = SimpleNamespace(offload_type=SimpleNamespace(value=f"{way.level}_level"), stream=object() if way.stream else None, record_stream=way.record,
                             low_cpu_mem_usage=way.stream and not way.pinned)
    assert group_way(config) == name


@pytest.mark.parametrize("level, name", [("leaf_level", "group-leaf"), ("block_level", "group-block")])
def test_groups_of_a_real_network_are_recognized(level, name):
    from diffusers import UNet2DModel
    network = UNet2DModel(sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
                          down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"))
    pipeline = SimpleNamespace(components={"unet": network}, _all_hooks=[])
    assert offload_of(pipeline) is None
    network.enable_group_offload(torch.device("cpu"), offload_type=level, num_blocks_per_group=1)
    assert offload_of(pipeline) == name
