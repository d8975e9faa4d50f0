"""Checkpoints in each layout become the same transformer; what is pickled, or does not fit, is refused."""

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import save_file
from wan_standin import IMAGE, SMALL, call_of, run

from allears import turbo
from allears.core.errors import WeightsError
from allears.turbo.wan import names
from allears.turbo.wan.load import load_experts, load_wan
from allears.turbo.wan.shapes import WAN_1_3B, WAN_14B, WanShape

needs_diffusers = pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers: pip install 'allears[hub]'")
HEAD = {"num_attention_heads": 1, "attention_head_dim": 128, "added_kv_proj_dim": None}


def original(layers=2, width=128, wide=40, channels=4, text=24, freq=16, image=None, norm=True):
    """Random weights under the original names, written out from Wan's published files."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"patch_embedding.weight": (width, channels, 1, 2, 2), "patch_embedding.bias": (width,)}

    def linear(name, out, into):
        sizes.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    linear("text_embedding.0", width, text)
    linear("text_embedding.2", width, width)
    linear("time_embedding.0", width, freq)
    linear("time_embedding.2", width, width)
    linear("time_projection.1", 6 * width, width)
    for i in range(layers):
        block = f"blocks.{i}"
        for attn in ("self_attn", "cross_attn"):
            for name in "qkvo":
                linear(f"{block}.{attn}.{name}", width, width)
            sizes.update({f"{block}.{attn}.norm_{name}.weight": (width,) for name in "qk"})
        if image:
            linear(f"{block}.cross_attn.k_img", width, width)
            linear(f"{block}.cross_attn.v_img", width, width)
            sizes[f"{block}.cross_attn.norm_k_img.weight"] = (width,)
        if norm:
            sizes.update({f"{block}.norm3.weight": (width,), f"{block}.norm3.bias": (width,)})
        linear(f"{block}.ffn.0", wide, width)
        linear(f"{block}.ffn.2", width, wide)
        sizes[f"{block}.modulation"] = (1, 6, width)
    if image:
        sizes.update({f"img_emb.proj.{i}.{kind}": (image,) for i in (0,) for kind in ("weight", "bias")})
        linear("img_emb.proj.1", image, image)
        linear("img_emb.proj.3", width, image)
        sizes.update({f"img_emb.proj.4.{kind}": (width,) for kind in ("weight", "bias")})
    linear("head.head", 4 * 4, width)
    sizes["head.modulation"] = (1, 2, width)
    return {name: 0.2 * torch.randn(size, generator=generator) for name, size in sizes.items()}


WAN_CONFIG = {"_class_name": "WanModel", "dim": 128, "num_heads": 1, "num_layers": 2, "eps": 1e-6, "model_type": "t2v"}


def save(folder, tensors, config=None, name="diffusion_pytorch_model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_each_name_has_its_counterpart():
    found = {name: names.rename(name) for name in original(1, image=20)}
    assert found["blocks.0.norm3.weight"] == "blocks.0.norm2.weight"  # the norm before cross-attention
    assert found["blocks.0.self_attn.o.bias"] == "blocks.0.attn1.to_out.0.bias"
    assert found["blocks.0.cross_attn.norm_k_img.weight"] == "blocks.0.attn2.norm_added_k.weight"
    assert (
        found["blocks.0.modulation"] == "blocks.0.scale_shift_table" and found["head.modulation"] == "scale_shift_table"
    )
    assert found["img_emb.proj.3.weight"] == "condition_embedder.image_embedder.ff.net.2.weight"
    assert len(set(found.values())) == len(found)
    for wrong in ("blocks.0.vace.before_proj.weight", "blocks.0.norm2.running_mean", "nothing.weight"):
        with pytest.raises(WeightsError, match="is no name of a Wan transformer"):
            names.rename(wrong)


def test_layouts_are_told_apart():
    plain = original()
    assert names.find_layout(plain) == "wan" == names.find_layout([f"model.diffusion_model.{n}" for n in plain])
    assert names.find_layout([f"net.{n}" for n in plain]) == "turbodiffusion"
    assert names.find_layout([*plain, "blocks.0.self_attn.attn_op.local_attn.proj_l.weight"]) == "turbodiffusion"
    assert names.find_layout(names.rename(n) for n in plain) == "diffusers"
    with pytest.raises(WeightsError, match=r"the names \(a.b, ...\) are neither"):
        names.find_layout(["a.b"])


def test_sizes_are_read_from_the_weights():
    state = names.convert(original(3, image=20, channels=7)).state
    shape = WanShape(3, 1, 40, 128, 7, 4, 24, 16, image_dim=20)
    assert names.shape_of(state) == shape
    assert names.shape_of(names.convert(original(norm=False)).state).cross_attn_norm is False
    assert names.shape_of(state, heads=4).head_dim == 32
    with pytest.raises(WeightsError, match="width 128 does not split into 3 heads"):
        names.shape_of(state, heads=3)
    del state["proj_out.weight"]
    with pytest.raises(WeightsError, match=r"proj_out.weight.* is missing"):
        names.shape_of(state)


def test_int8_tiles_become_the_weights_that_they_stand_for():
    weight = torch.randint(-127, 128, (130, 200), dtype=torch.int8)
    scale = torch.tensor([[0.5, 2.0], [4.0, 0.25]])
    found = names.from_tiles(weight, scale)
    assert found.dtype == torch.bfloat16
    for row, column in ((0, 0), (127, 199), (128, 0), (129, 128)):
        wanted = weight[row, column].float() * scale[row // 128, column // 128]
        assert found[row, column].item() == pytest.approx(wanted.item(), rel=2**-8)
    with pytest.raises(WeightsError, match=r"scales \(1, 2\) for INT8 \(130, 200\); wanted \(2, 2\)"):
        names.from_tiles(weight, scale[:1])
    with pytest.raises(WeightsError, match=r"has no 'ffn.0.scale' beside it"):
        names.convert({"ffn.0.int8_weight": weight})


def test_parameters_are_counted():
    assert WAN_1_3B.layers * WAN_1_3B.block_parameters() + WAN_1_3B.other_parameters() == 1_418_996_800
    assert WAN_14B.layers * WAN_14B.block_parameters() + WAN_14B.other_parameters() == 14_288_491_584
    for more in ({}, {"image_dim": 20, "channels": 7}):
        tensors = original(2, image=more.get("image_dim"), channels=more.get("channels", 4))
        shape = names.shape_of(names.convert(tensors).state)
        total = 2 * shape.block_parameters() + shape.other_parameters()
        assert total == sum(value.numel() for value in tensors.values())


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_pickles_are_refused_with_the_way_out(tmp_path, suffix):
    path = tmp_path / f"TurboWan{suffix}"
    path.write_bytes(b"")
    for given in (path, tmp_path):
        with pytest.raises(WeightsError, match=r"is a pickle, and no pickle is loaded here; .*weights_only=True"):
            load_wan(given)


def test_folders_without_a_transformer(tmp_path):
    with pytest.raises(WeightsError, match="neither a file nor a folder"):
        load_wan(tmp_path / "none")
    with pytest.raises(WeightsError, match="no safetensors file in"):
        load_wan(tmp_path)
    (tmp_path / "high_noise_model").mkdir()
    with pytest.raises(WeightsError, match="is a whole pipeline; use load_experts"):
        load_wan(tmp_path)
    folder = save(tmp_path / "two", original(), name="a.safetensors")
    save(folder, original(), name="b.safetensors")
    with pytest.raises(WeightsError, match=r"2 safetensors files in .* and no index"):
        load_wan(folder)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "c.safetensors"}})
    )
    with pytest.raises(WeightsError, match=r"lacks 'c.safetensors' of its index"):
        load_wan(folder)
    (tmp_path / "cut.safetensors").write_bytes(b"12345678901")
    with pytest.raises(WeightsError, match=r"'cut.safetensors' is not a readable safetensors file"):
        load_wan(tmp_path / "cut.safetensors")


@pytest.fixture
def wanted(tmp_path):
    """The transformer of these weights as diffusers itself reads it, and what it gives."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.WanTransformer3DModel(**{**SMALL, **HEAD, "ffn_dim": 40}).eval()
    model.load_state_dict(names.convert(original()).state)
    model.save_pretrained(tmp_path / "diffusers")
    return model, call_of(model), run(model, call_of(model))


@needs_diffusers
def test_all_layouts_give_the_same_transformer(tmp_path, wanted):
    _model, call, out = wanted
    plain = original()
    flat = {
        f"net.{name}": value.flatten(1) if name == "patch_embedding.weight" else value for name, value in plain.items()
    }
    wrapped = {
        name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): value for name, value in plain.items()
    }
    folders = {
        "diffusers": tmp_path / "diffusers",
        "wan": save(tmp_path / "wan", plain, WAN_CONFIG),
        "wan ": save(tmp_path / "bare", wrapped, name="any.safetensors"),
        "turbodiffusion": save(tmp_path / "turbo", flat) / "diffusion_pytorch_model.safetensors",
    }
    for layout, folder in folders.items():
        loaded = load_wan(folder, dtype=torch.float32)
        assert loaded.layout == layout.strip() and not loaded.projections and loaded.shape.heads == 1
        assert torch.equal(run(loaded.model, call), out)
        assert loaded.model.config.num_layers == 2 and not loaded.model.training


@needs_diffusers
def test_int8_layers_and_projections_of_turbodiffusion(tmp_path, wanted):
    _model, call, out = wanted
    tensors = original()
    weight = tensors.pop("blocks.1.ffn.0.weight")
    scale = weight.abs().max() / 127
    tensors |= {
        "blocks.1.ffn.0.int8_weight": (weight / scale).round().to(torch.int8),
        "blocks.1.ffn.0.scale": scale.reshape(1, 1),
        "blocks.0.self_attn.attn_op.local_attn.proj_l.weight": torch.eye(128),
        "blocks.0.self_attn.attn_op.local_attn.proj_l.bias": torch.zeros(128),
    }
    loaded = load_wan(save(tmp_path / "t", tensors), dtype=torch.float32)
    assert loaded.from_int8 == 1 and list(loaded.projections) == ["blocks.0.attn1"]
    found = run(loaded.model, call)
    assert 1e-6 < (found - out).norm() / out.norm() < 0.02
    cores = turbo.sla_cores(loaded.projections, loaded.model)
    assert torch.equal(cores["blocks.0.attn1"].proj.weight, torch.eye(128))


@needs_diffusers
@pytest.mark.parametrize("folders", [("transformer", "transformer_2"), ("high_noise_model", "low_noise_model")])
def test_two_experts(tmp_path, folders):
    first, second = original(), {name: 2 * value for name, value in original().items()}
    for folder, tensors in zip(folders, (first, second), strict=True):
        save(tmp_path / folder, tensors, WAN_CONFIG)
    loaded = load_experts(tmp_path)
    assert list(loaded) == ["transformer", "transformer_2"]
    weights = [part.model.blocks[0].attn1.to_q.weight for part in loaded.values()]
    assert torch.equal(2 * weights[0], weights[1]) and weights[0].dtype == torch.bfloat16
    assert loaded["transformer"].model.blocks[0].norm2.weight.dtype == torch.float32
    assert list(load_experts(tmp_path / folders[0])) == ["transformer"]


@needs_diffusers
def test_a_checkpoint_that_does_not_fit(tmp_path):
    tensors = original(image=20)
    del tensors["blocks.1.self_attn.q.bias"]
    with pytest.raises(WeightsError, match=r"missing blocks.1.attn1.to_q.bias"):
        load_wan(save(tmp_path / "a", tensors))


@needs_diffusers
def test_image_to_video_is_known_by_its_weights(tmp_path):
    loaded = load_wan(save(tmp_path / "i2v", original(image=20, channels=8)), dtype=torch.float32)
    assert loaded.model.config.image_dim == 20 and loaded.model.config.added_kv_proj_dim == 128
    call = call_of(loaded.model)
    first = run(loaded.model, call)
    call["encoder_hidden_states_image"] = call["encoder_hidden_states_image"] + 1
    assert torch.isfinite(first).all() and not torch.equal(run(loaded.model, call), first)
    assert IMAGE["in_channels"] == loaded.model.config.in_channels
