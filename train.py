"""python train.py experiment=vae_rgba [group=option ...] [key=value ...]; --help lists what there
is.

The same as `acetate train ...`.
"""

from acetate.cli import run

if __name__ == "__main__":
    run("train")
