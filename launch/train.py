"""Train a model: ``torchrun --nproc-per-node 2 launch/train.py [group=choice] [key=value] ...``

Composes recipes/ into a TrainConfig, which refuses what is misspelt or of the wrong type, and hands
it to cp_gdn.train. Without arguments it runs recipes/experiment/quickstart.yaml. ``--cfg job``
shows the configuration instead of running it.
"""

import os
import sys
from typing import cast

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.distributed.elastic.multiprocessing.errors import record

from cp_gdn.train.config import TrainConfig
from cp_gdn.train.trainer import train

ConfigStore.instance().store(name="train_schema", node=TrainConfig)


@record
def run(recipe: DictConfig) -> None:
    """Exit code 2 and one message a rank for what the user can mend; anything else keeps its traceback."""
    try:
        config = cast(TrainConfig, OmegaConf.to_object(recipe))
        train(config, config_text=OmegaConf.to_yaml(recipe, resolve=True))
    except (ValueError, ArithmeticError, OmegaConfBaseException) as error:
        print(
            f"[rank {os.environ.get('RANK', '0')}] {type(error).__name__}: {error}",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(2) from error


@hydra.main(version_base="1.3", config_path="../recipes", config_name="train")
def main(recipe: DictConfig) -> None:
    run(recipe)


if __name__ == "__main__":
    main()
