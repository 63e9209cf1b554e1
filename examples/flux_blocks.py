"""A Flux pipeline, small and with random weights, whose repeated blocks piecework compiles: one image, as PNG.

python examples/flux_blocks.py image.png            one command; the second run finds the pieces in the store
python examples/flux_blocks.py image.png --eager    without compiling, for comparison
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

WIDTH = 32


def make_pipeline() -> Any:
    """Return a pipeline that takes embeddings of a prompt; real ones are `FluxPipeline.from_pretrained(...)`."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, *, size: int = 32, texts: int = 8, kind: str = "pt") -> Any:
    """Return an image of a random prompt: a tensor, or with kind "pil" an image."""
    seeded = torch.Generator().manual_seed(1)
    found = pipeline(
        prompt_embeds=torch.randn(1, texts, WIDTH, generator=seeded),
        pooled_prompt_embeds=torch.randn(1, WIDTH, generator=seeded),
        height=size,
        width=size,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(2),
        output_type=kind,
    )
    return found.images[0]


def main() -> None:
    """Draw an image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", help="the file to write")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    args = parser.parse_args()
    pipeline = make_pipeline()
    if not args.eager:
        pipeline.transformer.compile_repeated_blocks(backend="piecework", fullgraph=True)
    draw(pipeline, kind="pil").save(args.image)
    print(f"wrote {args.image}")


if __name__ == "__main__":
    main()
