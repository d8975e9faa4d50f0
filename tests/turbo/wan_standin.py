"""A Wan transformer in small that needs no diffusers: the interface of diffusers' classes, and their class names, which
is all that the library goes by. The mathematics is written out plainly, in the dtype of the weights.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn


class WanAttnProcessor:
    _parallel_config = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        picture = None
        if attn.add_k_proj is not None:
            split = context.shape[1] - 512
            picture, context = context[:, :split], context[:, split:]
        if attn.fused_projections and not attn.is_cross_attention:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        elif attn.fused_projections:
            q, (k, v) = attn.to_q(hidden_states), attn.to_kv(context).chunk(2, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        q, k = attn.norm_q(q), attn.norm_k(k)
        if rotary_emb is not None:
            q, k = (turn(x, attn.heads, *rotary_emb) for x in (q, k))
        y = attend(attn, q, k, v)
        if picture is not None:
            fused = attn.fused_projections
            k, v = (
                attn.to_added_kv(picture).chunk(2, -1)
                if fused
                else (attn.add_k_proj(picture), attn.add_v_proj(picture))
            )
            y = y + attend(attn, q, attn.norm_added_k(k), v)
        return attn.to_out[1](attn.to_out[0](y))


def attend(attn, q, k, v):
    q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def turn(x, heads, cos, sin):
    pairs = torch.view_as_complex(x.unflatten(-1, (heads, -1, 2)).float().contiguous())
    angle = torch.complex(cos[..., 0::2].float(), sin[..., 1::2].float())
    return torch.view_as_real(pairs * angle).flatten(2).to(x.dtype)


class WanAttention(nn.Module):
    fused_projections = False

    def __init__(self, dim, heads, cross, added=None):
        super().__init__()
        self.heads, self.is_cross_attention = heads, cross
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        self.add_k_proj = self.add_v_proj = None
        if added is not None:
            self.add_k_proj, self.add_v_proj = nn.Linear(added, dim), nn.Linear(added, dim)
            self.norm_added_k = nn.RMSNorm(dim, eps=1e-6)
        self.processor = WanAttnProcessor()

    def get_processor(self):
        return self.processor

    def set_processor(self, processor):
        self.processor = processor

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


class GELU(nn.Module):
    approximate = "tanh"

    def __init__(self, dim, wide):
        super().__init__()
        self.proj = nn.Linear(dim, wide)

    def forward(self, x):
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, dim, wide):
        super().__init__()
        self.net = nn.ModuleList([GELU(dim, wide), nn.Dropout(0.0), nn.Linear(wide, dim)])

    def forward(self, x):
        for part in self.net:
            x = part(x)
        return x


class WanTransformerBlock(nn.Module):
    def __init__(self, dim, wide, heads, cross_attn_norm, added):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.attn1 = WanAttention(dim, heads, False)
        self.norm2 = nn.LayerNorm(dim, 1e-6) if cross_attn_norm else nn.Identity()
        self.attn2 = WanAttention(dim, heads, True, added)
        self.norm3 = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.ffn = FeedForward(dim, wide)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb):
        x = hidden_states
        if temb.dim() == 4:
            parts = [part.squeeze(2) for part in (self.scale_shift_table[None] + temb).chunk(6, 2)]
        else:
            parts = (self.scale_shift_table + temb).chunk(6, 1)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = parts
        x = x + gate * self.attn1(self.norm1(x) * (1 + scale) + shift, None, None, rotary_emb)
        x = x + self.attn2(self.norm2(x), encoder_hidden_states)
        return x + gate_ff * self.ffn(self.norm3(x) * (1 + scale_ff) + shift_ff)


class Rope(nn.Module):
    def __init__(self, attention_head_dim, patch_size, max_seq_len):
        super().__init__()
        self.attention_head_dim, self.patch_size, self.max_seq_len = attention_head_dim, patch_size, max_seq_len

    def forward(self, x):
        length = math.prod(size // part for size, part in zip(x.shape[2:], self.patch_size, strict=True))
        rates = 100.0 ** (-torch.arange(self.attention_head_dim // 2, device=x.device) / self.attention_head_dim)
        angle = (torch.arange(length, device=x.device)[:, None] * rates).repeat_interleave(2, -1)[None, :, None]
        return angle.cos(), angle.sin()


class Condition(nn.Module):
    def __init__(self, dim, freq_dim, text_dim, image_dim):
        super().__init__()
        self.freq_dim = freq_dim
        self.time, self.time_proj = nn.Linear(freq_dim, dim), nn.Linear(dim, 6 * dim)
        self.text = nn.Linear(text_dim, dim)
        self.image = None if image_dim is None else nn.Linear(image_dim, dim)


class WanTransformer3DModel(nn.Module):
    def __init__(self, **config):
        super().__init__()
        self.config = SimpleNamespace(**config)
        c = self.config
        dim = c.num_attention_heads * c.attention_head_dim
        self.rope = Rope(c.attention_head_dim, c.patch_size, 16)
        self.patch_embedding = nn.Conv3d(c.in_channels, dim, c.patch_size, c.patch_size)
        self.condition_embedder = Condition(dim, c.freq_dim, c.text_dim, c.image_dim)
        added = c.added_kv_proj_dim
        block = (dim, c.ffn_dim, c.num_attention_heads, c.cross_attn_norm, added)
        self.blocks = nn.ModuleList([WanTransformerBlock(*block) for _ in range(c.num_layers)])
        self.norm_out = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, c.out_channels * math.prod(c.patch_size))

    def forward(
        self, hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image=None, return_dict=True
    ):
        c, embed = self.config, self.condition_embedder
        rotary, (batch, _, *sizes) = self.rope(hidden_states), hidden_states.shape
        x = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
        rates = torch.arange(c.freq_dim, device=timestep.device) / c.freq_dim
        temb = embed.time(torch.cos(timestep[..., None].float() * rates).to(x.dtype))
        temb = embed.time_proj(F.silu(temb)).unflatten(-1, (6, -1))
        text = embed.text(encoder_hidden_states)
        if encoder_hidden_states_image is not None:
            text = torch.cat([embed.image(encoder_hidden_states_image), text], dim=1)
        for block in self.blocks:
            x = block(x, text, temb, rotary)
        x = self.proj_out(self.norm_out(x))
        parts = [size // part for size, part in zip(sizes, c.patch_size, strict=True)]
        x = x.reshape(batch, *parts, *c.patch_size, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        x = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return SimpleNamespace(sample=x) if return_dict else (x,)


class Pipeline:
    """The loop of diffusers' Wan pipelines, as they are written: what they ask of a transformer and a scheduler."""

    def __init__(self, transformer, scheduler, transformer_2=None, boundary_ratio=None):
        self.transformer, self.transformer_2, self.scheduler = transformer, transformer_2, scheduler
        self.boundary_ratio = boundary_ratio

    @property
    def do_classifier_free_guidance(self):
        return self.guidance_scale > 1

    @torch.no_grad()
    def __call__(self, latents, text, condition=None, num_inference_steps=50, guidance_scale=5.0):
        self.guidance_scale = guidance_scale
        self.scheduler.set_timesteps(num_inference_steps, device=latents.device)
        self.scheduler.set_begin_index(0)
        for i, t in enumerate(self.scheduler.timesteps):
            high = self.boundary_ratio is None or t >= self.boundary_ratio * self.scheduler.config.num_train_timesteps
            model = self.transformer if high else self.transformer_2
            seen = latents.to(model.proj_out.weight.dtype)
            seen = seen if condition is None else torch.cat([seen, condition], dim=1)
            float(self.scheduler.sigmas[i])
            velocity = model(
                hidden_states=seen,
                timestep=t.expand(latents.shape[0]),
                encoder_hidden_states=text,
                return_dict=False,
            )[0]
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
        return latents


SMALL = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 16,
    "ffn_dim": 48,
    "num_layers": 2,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}
IMAGE = {"image_dim": 20, "added_kv_proj_dim": 32, "in_channels": 8}


def make(seed=0, kind="plain", **more):
    """A small transformer; ``kind`` "diffusers" takes that library's own."""
    torch.manual_seed(seed)
    config = {**SMALL, **more}
    if kind == "diffusers":
        import diffusers

        model = diffusers.WanTransformer3DModel(**config, rope_max_seq_len=16)
    else:
        model = WanTransformer3DModel(**config)
    return model.eval().requires_grad_(False)


def call_of(model, size=(3, 6, 10), text=5, seed=1, batch=1):
    """Arguments of a call: (3 x 3 x 5) = 45 tokens by default."""
    generator = torch.Generator().manual_seed(seed)
    c = model.config

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    inputs = {
        "hidden_states": normal(batch, c.in_channels, *size),
        "timestep": torch.full((batch,), 700.0),
        "encoder_hidden_states": normal(batch, 512 if c.image_dim else text, c.text_dim),
    }
    if c.image_dim:
        inputs["encoder_hidden_states_image"] = normal(batch, 7, c.image_dim)
    return inputs


@torch.no_grad()
def run(model, inputs):
    return model(**inputs, return_dict=False)[0]
