"""Names of Wan's tensors: the original release's against diffusers'."""

from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers


def vae_name(original: str) -> str:
    """Of a tensor of the VAE, original -> diffusers."""
    (name,) = convert_wan_vae_to_diffusers({original: None})
    return name


def dit_name(original: str) -> str:
    """Of a tensor of the DiT, original -> diffusers."""
    (name,) = convert_wan_transformer_to_diffusers({original: None})
    return name
