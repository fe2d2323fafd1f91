"""Settings: precedence, errors that name the nearest key, digests."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from rayscan import config
from rayscan.config import CapturesConfig, RunConfig, TrainConfig
from rayscan.errors import ConfigError


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("train: {steps: 20, batch_sources: 20, seed: 20}\n")
    env = {"RAYSCAN_TRAIN__BATCH_SOURCES": "30", "RAYSCAN_TRAIN__SEED": "30", "RAYSCAN_DATA": "/x"}
    found = config.load("quick", file, ["train.seed=40"], env)
    assert found.sequences.length == 16  # the preset's
    assert (found.train.steps, found.train.batch_sources, found.train.seed) == (20, 30, 40)
    assert found.train.temperature == TrainConfig().temperature


@pytest.mark.parametrize("preset", config.preset_names())
def test_presets_load_and_survive_yaml(preset: str) -> None:
    found = config.load(preset, env={})
    assert config.from_yaml(config.as_yaml(found), "here") == found


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("trian.steps=5", "unknown setting trian; did you mean train?"),
        ("train.stepz=3", "unknown setting train.stepz; did you mean train.steps?"),
        ("steps=3", "did you mean train.steps?"),
        ("train.steps=-1", "train.steps: Input should be greater than or equal to 1"),
        ("train.steps=many", "train.steps: Input should be a valid integer"),
        ("captures.latest=2020-01-01T00:00:00", "latest needs a time zone"),
        ("captures.latest=1980-01-01T00:00:00Z", "earliest must lie before latest"),
        ("model.heads=3", "heads 3 does not divide d_model 128"),
        ("model.inputs=[dst, dst]", "inputs names a column twice"),
        ("sequences.min_length=500", "min_length 500 exceeds length 128"),
        ("train=5", "train is a section"),
        ("train.steps", "takes section.key=value"),
        ("train.steps=[1", "is not a YAML value"),
        ("run=../x", "run: String should match pattern"),
        ("split.test_sources=0.95", "leave no source to train on"),
        ("cluster.threshold=none", "cluster.threshold"),
    ],
)
def test_bad_settings_are_named(item: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.load(sets=[item], env={})
    assert message in str(error.value)
    assert error.value.exit_code == 2


def test_the_origin_of_an_unknown_key_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("cluster: {treshold: 0.4}\n")
    with pytest.raises(ConfigError, match=r"mine.yaml: unknown setting cluster.treshold; did you mean"):
        config.load(file=file, env={})
    with pytest.raises(ConfigError, match=r"environment: unknown setting train.setps"):
        config.load(env={"RAYSCAN_TRAIN__SETPS": "3"})


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n", "must hold sections"), ("a: [", "not valid YAML"), (None, "cannot read the config file")],
)
def test_bad_files(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "c.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.load(file=file, env={})


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match=r"no preset 'quik'; did you mean quick\?"):
        config.load("quik", env={})


def test_one_path_may_stand_alone() -> None:
    assert config.load(sets=["captures.paths=/a"], env={}).captures.paths == ("/a",)


def test_digest_covers_what_changes_results_and_nothing_else() -> None:
    base = TrainConfig()
    assert config.digest(base) == config.digest(TrainConfig(workers=8, threads=3, device="cpu"))
    changed = {
        config.digest(TrainConfig(**{name: value}))
        for name, value in {
            "steps": 7,
            "seed": 9,
            "temperature": 0.5,
            "decay": "all",
            "pool_steps": 3,
        }.items()
    }
    assert len(changed | {config.digest(base)}) == 6


def test_a_setting_added_by_an_upgrade_makes_nothing_stale() -> None:
    class Before(config.Section):
        kept: int = 3

    class After(config.Section):
        kept: int = 3
        added: str = config._since("as before", "What came later.")

    class Later(config.Section):
        kept: int = 3
        added: str = Field("better", json_schema_extra=After.model_fields["added"].json_schema_extra)

    assert config.digest(After()) == config.digest(Before())
    assert config.digest(After(added="better")) == config.digest(Later()) != config.digest(Before())
    assert config.digest(Later(added="as before")) == config.digest(Before())
    assert config.digest(CapturesConfig(format="csv")) != config.digest(CapturesConfig())


def test_sections_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().train.steps = 3  # type: ignore[misc]
