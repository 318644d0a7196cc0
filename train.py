"""python train.py experiment=vae_rgba [group=option ...] [key=value ...]; --help lists what there is."""

from omegaconf import DictConfig

from acetate.commands.program import program


@program("config")
def main(config: DictConfig) -> float | None:
    from acetate.commands.train import train  # imports take seconds, which a wrong setting need not wait for

    return train(config)


if __name__ == "__main__":
    main()
