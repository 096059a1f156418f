"""Pretrain an encoder: accelerate launch tools/pretrain.py recipe=NAME [key=value ...]"""

from ssl_vit.commands.train import run_training
from ssl_vit.commands.training_run import train
from ssl_vit.recipes import Pretrain as Config


def run(recipe: Config) -> int:
    """Train what the recipe says, from the checkpoint if there is one; returns the exit code."""
    return run_training(recipe, train)
