"""Checks that cached latents are of the models that a run names."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from acetate.data.shards import ShardError
from acetate.formats.rgba_vae import comfyui_pair, read_rgba_vae
from acetate.models.loading import load_vae, weights_sha256
from acetate.models.rgba_vae import latents_sha256


class SameBase(Callback):
    """Compares the latents' base VAE and RGBA-VAE with the run's, before anything is trained.

    vae, rgba_vae: as the settings wan.vae and rgba_vae; None, or files that are not there, are not
    compared, and it warns. Raises ShardError that names the folder and both hashes.
    """

    def __init__(self, vae: str, rgba_vae: str | Sequence[str] | None) -> None:
        self.vae, self.rgba_vae = vae, rgba_vae

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        try:
            base = load_vae(self.vae)
        except FileNotFoundError as error:
            rank_zero_warn(f"the base of the latents is not compared with wan.vae: {error}")
            return
        base_sha256 = weights_sha256(base)
        self._compare(data, "base_sha256", base_sha256, f"wan.vae={self.vae}")
        blocks = base.config.num_res_blocks
        del base
        found = self._of_adapters(base_sha256, blocks)
        if found is not None:
            self._compare(data, "vae_sha256", found, f"rgba_vae={self.rgba_vae}")

    def _of_adapters(self, base_sha256: str, res_blocks: int) -> str | None:
        """Returns the hash of the RGBA-VAE; None for files that only decode, or are not there."""
        try:
            if self.rgba_vae is None or comfyui_pair(self.rgba_vae) is not None:
                return None
            _, state, facts = read_rgba_vae(str(self.rgba_vae), res_blocks)
        except FileNotFoundError as error:
            rank_zero_warn(f"the latents' vae_sha256 is not compared with rgba_vae: {error}")
            return None
        merge = {
            name.removeprefix("merge."): value
            for name, value in state.items()
            if name.startswith("merge.")
        }
        return latents_sha256(base_sha256, facts["merge_init"], merge) if merge else None

    @staticmethod
    def _compare(data: Any, name: str, found: str, setting: str) -> None:
        cached = data.manifest[name]
        if cached != found:
            folders = ", ".join(map(str, data.folders))
            raise ShardError(
                f"{folders}: the latents were cached with {name} {cached[:12]}, {setting} has "
                f"{found[:12]}. Give the wan= and rgba_vae= that they were cached with, or cache "
                "them anew."
            )
