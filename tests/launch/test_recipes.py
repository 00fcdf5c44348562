"""Every recipe composes into a TrainConfig; what is misspelt or of the wrong type does not."""

import dataclasses
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cp_gdn.models.hybrid import HybridConfig, HybridLM
from cp_gdn.train.config import ModelConfig, TrainConfig

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
CHOICES = sorted(
    f"{path.parent.name}={path.stem}"
    for path in RECIPES.glob("*/*.yaml")
    if path.parent.name != "experiment"
)


def composed(*overrides: str) -> TrainConfig:
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    with initialize_config_dir(str(RECIPES), version_base="1.3"):
        config = OmegaConf.to_object(compose("train", list(overrides)))
    assert isinstance(config, TrainConfig)
    return config


def test_without_arguments_it_is_the_quickstart():
    config = composed()
    assert config.name == "quickstart"
    assert config.folder == "runs/quickstart"
    assert config.cp.size is None
    assert config.data.kind == "stdlib"
    assert config.logging.wandb == "offline"
    assert config.steps >= 30
    assert config.logging.every == 1


def test_without_the_experiment_a_run_must_be_named():
    assert composed("experiment=none", "name=mine").steps == 1000
    with pytest.raises(OmegaConfBaseException, match="name"):
        composed("experiment=none")


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes(choice):
    overrides = [choice] + (["data.path=somewhere"] if choice == "data=text" else [])
    composed(*overrides)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("model/*.yaml")), ids=lambda p: p.stem)
def test_every_model_is_a_valid_hybrid(path):
    model = composed(f"model={path.stem}").model
    assert model.for_vocabulary(257).layer_types.count("full_attention") == model.num_layers // 4


def test_the_overrides_of_the_readme():
    text = (RECIPES.parent / "README.md").read_text().replace("\\\n", "")
    (command,) = [
        line for line in text.splitlines() if "torchrun" in line and "launch/train.py" in line
    ]
    config = composed(*command.split("launch/train.py")[1].split(), "seed=3")
    assert config.cp.size == 2
    assert config.zero_stage == 2
    assert (config.data.kind, config.data.path, config.data.seed) == ("text", "books/", 3)
    assert config.folder == "runs/books"
    # none of the quickstart's values, and what the kernels take
    assert (config.steps, config.optim.lr, config.precision) == (5000, 3e-4, "bf16")


@pytest.mark.parametrize(
    "override",
    [
        "cp.sizee=2",
        "optim.learning_rate=1",
        "cp.size=abc",
        "model=tinny",
        "model.hidden_size=1.5",
        "stepss=3",
        "precision=[fp32]",
    ],
)
def test_a_typo_or_a_wrong_type_is_refused_at_composition(override):
    with pytest.raises((HydraException, OmegaConfBaseException)):
        composed(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("precision=fp8", "precision is 'fp8' but must be one of fp32, bf16"),
        ("cp.exchange=pigeon", "cp.exchange is 'pigeon' but must be one of auto, ring"),
        ("optim.schedule=step", "optim.schedule is 'step'"),
        ("logging.wandb=maybe", "logging.wandb is 'maybe'"),
        ("steps=0", "steps is 0 but must be at least 1"),
        ("+deepspeed.bf16.enabled=true", "deepspeed.bf16 is derived by the trainer; leave it out"),
        ("deepspeed.zero_optimization.stage=4", "must be 0, 1, 2 or 3"),
        ("deepspeed.zero_optimization=null", "zero_optimization is None but must be a dictionary"),
        ("timeout_s=0", "timeout_s is 0.0 but must be at least 1"),
        ("optim.lr=nan", "optim.lr is nan but must be at least 0"),
        ("name=a/b", "name is 'a/b'"),
        ("data=text", "path is not set"),
    ],
)
def test_a_wrong_value_is_one_sentence(override, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        composed(override)


def test_the_model_recipe_has_the_fields_of_the_model():
    ours = {f.name for f in dataclasses.fields(ModelConfig)}
    assert ours == {f.name for f in dataclasses.fields(HybridConfig)} - {"vocab_size"}


def test_a_recipe_chooses_the_engine_of_every_layer():
    config = composed("model=tiny", "model.engine=torch")
    assert composed("model=tiny").model.engine == "auto"
    layers = HybridLM(config.model.for_vocabulary(257)).model.layers
    assert [m.linear_attn.engine for m in layers if m._linear] == ["torch"] * 3
    with pytest.raises(ValueError, match="engine='cuda' is unknown"):
        composed("model.engine=cuda")
