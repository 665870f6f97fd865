"""What is planned for: a model's config and the tensors a bundle of it has, weights not needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mimo_edge.bundle import Bundle
from mimo_edge.config import MimoConfig
from mimo_edge.devices.profile import DeviceProfile
from mimo_edge.errors import BundleError, ConfigError
from mimo_edge.export.gguf_tokenizer import tokenizer_metadata
from mimo_edge.export.job import choose_formats, choose_recipe, plan_layouts
from mimo_edge.export.mapping import canonical_tensors
from mimo_edge.gguf_file import TensorInfo
from mimo_edge.heat import Heat
from mimo_edge.inventory import BUILT_IN
from mimo_edge.known_models import KNOWN_MODELS, known_model
from mimo_edge.manifest import MANIFEST_NAME
from mimo_edge.quant.recipe import Recipe
from mimo_edge.text_file import read_json

# Tokenizer, chat template and manifest of a bundle, per token of the vocabulary: the 152,576
# tokens of MiMo-V2 take 11 MB as tokenizer.json and about as much again in the GGUF header.
TEXT_BYTES_PER_TOKEN = 160
# Every V2 release has them, but its config.json does not say so.
_V2_MTP_BLOCKS = 3
_MAX_CONFIG_BYTES = 4 << 20


@dataclass(frozen=True)
class PlannedModel:
    """A model as a bundle would hold it, or holds it.

    `recipe` is the name of its recipe, "as stored" for files of other makers; `bundle_bytes` is
    everything it takes on flash. `notes` say what was assumed.
    """

    name: str
    config: MimoConfig
    tensors: Mapping[str, TensorInfo]
    bundle_bytes: int
    recipe: str
    needs_calibration: bool = False
    heat: Heat | None = None
    notes: tuple[str, ...] = ()

    def with_recipe(self, recipe: str, overrides: Sequence[tuple[str, str]] = ()) -> PlannedModel:
        """The same model exported anew by another recipe, with (glob, format) pairs that win over
        it. Raises UsageError on an unknown name."""
        made = Recipe.named(recipe, family=self.config.family).with_overrides(overrides)
        return _exported(self.name, self.config, made, self.heat, self.notes)


def planned_model(what: str | Path, profile: DeviceProfile, recipe: str | None) -> PlannedModel:
    """The model `what` names: a bundle folder, a GGUF file, a checkpoint folder, a config.json, or
    a released model's name. `recipe` None is a bundle's own, else the profile's.

    Reads headers only. Raises the errors of opening each, BundleError when it is none of them.
    """
    path = Path(what)
    if path.is_file() and path.suffix == ".json":
        return _of_config(path, profile, recipe)
    if path.is_file() or (path / MANIFEST_NAME).is_file():
        return _of_bundle(path, recipe)
    if (path / "config.json").is_file():
        if any(path.glob("*.safetensors")):
            return _of_checkpoint(path, path.name, profile, recipe)
        return _of_config(path / "config.json", profile, recipe)
    if not path.is_dir():
        if str(what) == BUILT_IN:
            return built_in(profile, recipe)
        if str(what) in KNOWN_MODELS:
            return of_config(str(what), known_model(str(what)), profile, recipe)
    raise BundleError(
        f"there is no model {what}",
        "give a bundle, a .gguf file, a checkpoint folder, a config.json or one of "
        + ", ".join((BUILT_IN, *KNOWN_MODELS)),
    )


def built_in(profile: DeviceProfile, recipe: str | None = None) -> PlannedModel:
    """The model that ships with us."""
    from mimo_edge.nano.commands import checkpoint_dir

    return _of_checkpoint(checkpoint_dir(), BUILT_IN, profile, recipe)


def of_config(
    name: str,
    config: MimoConfig,
    profile: DeviceProfile,
    recipe: str | None,
    notes: tuple[str, ...] = (),
) -> PlannedModel:
    """A model of which only the config is known."""
    return _exported(name, config, choose_recipe(recipe, profile.recipe, config), None, notes)


def _exported(
    name: str,
    config: MimoConfig,
    recipe: Recipe,
    heat: Heat | None,
    notes: tuple[str, ...],
) -> PlannedModel:
    """What the exporter would write, from its own mapping, recipe and layout."""
    wanted = canonical_tensors(config)
    formats = {name: choice.format for name, choice in choose_formats(recipe, wanted).items()}
    keys = tokenizer_metadata({}, config.vocab_size, config.eos_token_ids, None)
    files, layouts = plan_layouts(config, name, wanted, formats, recipe, keys)
    tensors = {
        t.name: TensorInfo(
            t.name, t.ggml_type, t.shape, layout.offsets[t.name], t.nbytes, Path(file)
        )
        for file, layout in zip(files, layouts, strict=True)
        for t in layout.tensors.values()
    }
    size = sum(layout.size for layout in layouts) + TEXT_BYTES_PER_TOKEN * config.vocab_size
    return PlannedModel(
        name, config, tensors, size, recipe.name, recipe.requires_importance, heat, notes
    )


def _of_bundle(path: Path, recipe: str | None) -> PlannedModel:
    with Bundle.open(path) as bundle:
        manifest = bundle.manifest
        stored = "as stored" if manifest is None else str(manifest.recipe.get("name"))
        model = PlannedModel(
            bundle.name,
            bundle.config,
            dict(bundle.tensors),
            sum(file.stat().st_size for file in bundle.files),
            stored,
            heat=bundle.heat,
        )
    return model if recipe is None or recipe == stored else model.with_recipe(recipe)


def _of_checkpoint(
    folder: Path, name: str, profile: DeviceProfile, recipe: str | None
) -> PlannedModel:
    from mimo_edge.export.checkpoint import Checkpoint

    with Checkpoint.open(folder) as checkpoint:
        return of_config(name, checkpoint.config, profile, recipe)


def _of_config(path: Path, profile: DeviceProfile, recipe: str | None) -> PlannedModel:
    raw = read_json(path, _MAX_CONFIG_BYTES, ConfigError)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}, not an object")
    config = MimoConfig.from_hf(raw)
    notes: tuple[str, ...] = ()
    if config.family == "mimo_v2" and "num_nextn_predict_layers" not in raw:
        config = replace(config, num_mtp_layers=_V2_MTP_BLOCKS)
        notes = (
            f"config.json does not state MTP blocks: {_V2_MTP_BLOCKS}, as every V2 release has",
        )
    name = path.parent.name if path.name == "config.json" else path.stem
    return of_config(name or path.stem, config, profile, recipe, notes)
