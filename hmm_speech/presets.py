"""What a preset says of a group holds for the option that the preset chose."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from hydra import compose
from omegaconf import DictConfig

# Groups of which a run has one object each; what a preset says of the trainer or the callbacks holds for any of them.
PARTS = ("data", "topology", "initial", "transition", "emission", "context", "objective", "optimizer")


def without_leftovers(config: DictConfig, choices: Mapping[str, str], overrides: Sequence[str]) -> DictConfig:
    """The configuration, without a preset's settings of an option that the command line has replaced.

    ``recipes=flite/units optimizer=em`` should be EM as configs/optimizer/em.yaml has it, not EM with the learning rate
    that the preset found for AdamW. Hydra merges the preset over the group's option, whichever that is; so a part for
    which the command line picks another option than the preset's own is composed again without the preset. Settings
    from the command line itself (``optimizer.lr=1``) remain.

    Args:
        config: as Hydra composed it for ``train``; a part of it may be replaced.
        choices: the option of each group (``HydraConfig.get().runtime.choices``).
        overrides: the command line (``HydraConfig.get().overrides.task``).
    """
    preset, debug = choices.get("recipes"), choices.get("debug")
    if preset is None:
        return config
    own = _options_of(preset)
    replaced = [part for part in PARTS if choices[part] != own[part]]
    if replaced:
        # All options, since one may set something of another's: objective=semi_supervised shows it the data's phones.
        options = [f"{part}={choices[part]}" for part in PARTS if choices[part]] + ([f"debug={debug}"] if debug else [])
        settings = [override for override in overrides if _part_of_setting(override) in replaced]
        alone = compose("train", overrides=["~recipes", *options, *settings])
        for part in replaced:
            config[part] = alone[part]
    return config


@functools.cache
def _options_of(preset: str) -> Mapping[str, str]:
    """What a preset chooses in each group; the same for each run of a sweep."""
    return compose("train", overrides=[f"recipes={preset}"], return_hydra_config=True).hydra.runtime.choices


def _part_of_setting(override: str) -> str | None:
    """``optimizer`` of ``optimizer.lr=1`` and ``++optimizer.lr=1``; None of ``optimizer=em``, which is no setting."""
    group, dot, _ = override.lstrip("+~").split("=", 1)[0].partition(".")
    return group if dot else None
