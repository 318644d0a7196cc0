"""Names of Wan's tensors: the original release's against diffusers'."""

from acetate.models.loading import diffusers_dit_name, diffusers_vae_name


def vae_name(original: str, res_blocks: int = 2) -> str:
    """Of a tensor of the VAE, original -> diffusers. res_blocks: of the VAE's config, Wan2.1's by default."""
    return diffusers_vae_name(original, res_blocks)


def dit_name(original: str) -> str:
    """Of a tensor of the DiT, original -> diffusers."""
    return diffusers_dit_name(original)
