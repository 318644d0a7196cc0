"""Latents of the endless clips, encoded once and kept, to train the tiny base's DiT on them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from acetate.data.clips import TrainBatches
from acetate.data.endless import EndlessClips, EndlessDataModule
from acetate.draws import generator_for
from acetate.lightning_seams import batches_done
from acetate.models.loading import weights_sha256
from acetate.models.wan import WanEncoder, WanHead
from acetate.replacing import rename_over, write_tensors, writing

PER_FILE = 128  # clips
AT_ONCE = 8  # that are encoded: one at a time takes longer


class KeptLatents(Dataset):
    """Clips of files; training takes them in another order in each epoch, without end."""

    def __init__(self, files: list[Path], seed: int, endless: bool) -> None:
        self.seed, self.endless, self.prompts, self.keys = seed, endless, [], []
        parts: list[Tensor] = []
        for path in files:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["clips"])
                parts.append(file.get_tensor("latents"))
            self.keys += facts["keys"]
            self.prompts += facts["prompts"]
        self.latents = torch.cat(parts)
        self.epoch, self.order = -1, torch.arange(len(self.keys))

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        """Returns {latents (C, F, h, w) as the head gives them, prompt, key}."""
        epoch, place = divmod(index, len(self))
        if self.endless and epoch != self.epoch:
            generator = generator_for("kept latents", self.seed, epoch)
            self.epoch, self.order = epoch, torch.randperm(len(self), generator=generator)
        at = int(self.order[place])
        return {
            "latents": self.latents[at].float(),
            "prompt": self.prompts[at],
            "key": self.keys[at],
        }


class WanLatentsModule(EndlessDataModule):
    """The first `clips` of the endless clips as latents of a VAE, in files below `folder`.

    What is missing there is encoded before training; a later run with more clips keeps what there
    is. Files are named by all that decides them. settings: of EndlessDataModule.
    """

    def __init__(self, *, vae: AutoencoderKLWan, clips: int, folder: str, **settings: Any) -> None:
        super().__init__(**settings)
        if clips < PER_FILE or clips % PER_FILE:
            raise ValueError(f"data.clips={clips}; a positive multiple of {PER_FILE}.")
        self.vae, self.clips, self.folder = vae, clips, Path(folder)
        facts = [weights_sha256(vae), self.identity()]
        self.name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]

    def files(self) -> dict[Path, EndlessClips]:
        """Returns the files of training and, last, of validation, with what they hold."""
        parts = {
            self.folder / f"{self.name}-{start:08d}.safetensors": self.numbered(
                start=start, length=PER_FILE, step=1
            )
            for start in range(0, self.clips, PER_FILE)
        }
        val = self.folder / f"{self.name}-val-{self.val_clips}.safetensors"
        return parts | {val: self.numbered(start=2**31, length=self.val_clips, step=1)}

    def prepare_data(self) -> None:
        todo = {path: clips for path, clips in self.files().items() if not path.is_file()}
        if not todo:
            return
        vae = self.vae.requires_grad_(False)
        encoder, head = WanEncoder(vae), WanHead(vae)
        self.folder.mkdir(parents=True, exist_ok=True)
        for path, clips in tqdm(todo.items(), desc="latents", unit=f"{PER_FILE} clips"):
            items = [clips[index] for index in range(len(clips))]
            with torch.no_grad():
                videos = torch.stack([item["video"] for item in items]).split(AT_ONCE)
                latents = [head(encoder(part))[0].half() for part in videos]
            names = {f"{name}s": [item[name] for item in items] for name in ("key", "prompt")}
            temporary = path.with_suffix(".tmp")
            with writing(path):
                write_tensors(
                    {"latents": torch.cat(latents)}, temporary, {"clips": json.dumps(names)}
                )
                rename_over(temporary, path)

    def train_dataloader(self) -> DataLoader:
        rank, world, finished = 0, 1, 0
        if self.trainer is not None:
            rank, world = self.trainer.global_rank, self.trainer.world_size
            finished = batches_done(self.trainer)
        size = self.batch_size
        batches = TrainBatches(lambda: finished * size * world, size, rank, world)
        kept = KeptLatents([*self.files()][:-1], self.seed, endless=True)
        return DataLoader(kept, batch_sampler=batches)

    def val_dataloader(self) -> DataLoader:
        rank, world = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        )
        kept = KeptLatents([*self.files()][-1:], self.seed, endless=False)
        part = torch.utils.data.Subset(kept, range(rank, len(kept), world))
        return DataLoader(part, batch_size=min(self.batch_size, len(part)))
