"""Reading a configuration from YAML and KEY=VALUE overrides, with every problem at once; writing it; recipes by name.

Each problem is reported with its source: the file, or the override. The keys and their rules are in ``keys``.
"""

from __future__ import annotations

import copy
import difflib
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import yaml

from edge_grpo.config.checks import did_you_mean, matches, members, mismatch
from edge_grpo.config.keys import LOSS_VALUES, TrainConfig, options_of
from edge_kernels.config import GRPOLossConfig

Config = TypeVar("Config")
_NULL = ("null", "Null", "NULL", "~", "None")
_PRESET = "preset-"  # begins the file names of presets
_RECIPES = Path(__file__).resolve().parents[1] / "recipes"  # in a checkout a link to its top-level folder


class _Override(NamedTuple):
    """A KEY=VALUE that was applied: its text, its key, and the entry if the key is that of a mapping."""

    text: str
    key: str
    entry: str


class _Problem(NamedTuple):
    source: str  # "" for none
    text: str


def load_config(
    path: Path | str | None = None, overrides: Sequence[str] = (), *, preset: str | None = None
) -> TrainConfig:
    """Return the configuration in a YAML file (None: the defaults) after overrides such as "optim.learning_rate=1e-5".

    The keys that ``preset`` (one of ``preset_names``) sets come after the file's, and before the overrides.

    A value of an override is read as its field's type: text is taken as it stands, everything else is YAML, ``null``
    is None, and lists may be written "a,b". KEY.NAME=VALUE sets one entry of a mapping and leaves the others. Raises
    FileNotFoundError without the file, and one ValueError that lists every unknown key, every key given twice, every
    value of the wrong type or range, and every conflict, each with the file or the override that it comes from.
    """
    in_file = _read_yaml(Path(path)) if path is not None else {}
    if preset is not None:
        in_file = _merged(in_file, _read_yaml(_preset_path(preset)))
    tree, applied, problems = _override(in_file, overrides)
    config, found = _build_all(tree)
    if found:
        of_file = _build_all(in_file)[1] if overrides else found
        problems += [_Problem(str(path) if text in of_file else _culprit(text, applied), text) for text in found]
    return _accept(config, problems)


def from_dict(tree: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration in a nested mapping; the inverse of ``to_dict``, as strict as ``load_config``."""
    config, problems = _build_all(tree)
    return _accept(config, [_Problem("", text) for text in problems])


def section_from_dict(cls: type[Config], tree: Mapping[str, Any], name: str) -> Config:
    """Return one section's dataclass from a mapping, as strict as ``from_dict``; ``name`` is the section's."""
    problems: list[str] = []
    section = _build(cls, tree, f"{name}.", problems)
    if section is None:
        raise ValueError("\n".join(problems))
    return section


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as nested dicts of plain values that YAML and JSON can hold; tuples become lists."""

    def plain(value: Any) -> Any:
        if is_dataclass(value):
            return {name: plain(getattr(value, name)) for name in options_of(type(value))}
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    result: dict[str, Any] = plain(config)
    return result


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of what ``to_dict`` returns, by dotted key; a mapping that is itself a value stays whole."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        is_section = isinstance(value, Mapping) and (key not in _keys() or is_dataclass(_keys()[key]))
        leaves |= flatten(value, f"{key}.") if is_section else {key: value}
    return leaves


def recipe_names() -> list[str]:
    """Return the names that ``recipe_path`` knows; a file that begins with "verl-" is a configuration of verl."""
    return sorted(path.stem for path in _RECIPES.glob("*.yaml") if not path.stem.startswith(("verl-", _PRESET)))


def preset_names() -> list[str]:
    """Return the names of presets: files beside the recipes that set some keys of any configuration."""
    return sorted(path.stem.removeprefix(_PRESET) for path in _RECIPES.glob(f"{_PRESET}*.yaml"))


def recipe_path(name: str) -> Path:
    """Return the YAML file of a recipe that is shipped with the package, by its name without ".yaml"."""
    stem = name.removesuffix(".yaml")
    if stem in recipe_names():
        return _RECIPES / f"{stem}.yaml"
    hint = did_you_mean(name, recipe_names()) or f"; there are: {', '.join(recipe_names()) or 'none'}"
    raise ValueError(f"no recipe named {name!r} (--config takes a file){hint}")


def _preset_path(name: str) -> Path:
    if name in preset_names():
        return _RECIPES / f"{_PRESET}{name}.yaml"
    hint = did_you_mean(name, preset_names()) or f"; there are: {', '.join(preset_names())}"
    raise ValueError(f"no preset named {name!r}{hint}")


# ---- Files and overrides -------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader that rejects a key given twice, where YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                key, line = key_node.value, key_node.start_mark.line + 1
                if key in seen:
                    raise ValueError(f"line {line}: duplicate key {key!r}, first set on line {seen[key]}")
                seen[key] = line
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}; recipes are: {', '.join(recipe_names())}")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold `key: value` lines; got a {type(tree).__name__}")
    return tree


def _merged(tree: Mapping[str, Any], over: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``tree`` with the keys of ``over`` in it; a mapping that is itself a value is replaced as a whole."""
    merged = dict(tree)
    for name, value in over.items():
        is_section = is_dataclass(_keys()[f"{prefix}{name}"])
        inner = merged.get(name) or {}
        if is_section and isinstance(inner, Mapping):
            merged[name] = _merged(inner, value, f"{prefix}{name}.")
        elif not is_section:
            merged[name] = value
    return merged


def _override(
    in_file: Mapping[str, Any], overrides: Sequence[str]
) -> tuple[dict[str, Any], list[_Override], list[_Problem]]:
    """Return the file's tree with the overrides in it, those that were applied, and the problems of the others."""
    tree = copy.deepcopy(dict(in_file))
    applied: list[_Override] = []
    problems = []
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip()
        owner = next((k for k, kind in _keys().items() if get_origin(kind) is dict and key.startswith(f"{k}.")), key)
        override = _Override(text, owner, key[len(owner) + 1 :])
        try:
            if not equals or not key:
                raise ValueError("must read KEY=VALUE")
            for other in applied:
                if other.key == owner and (other.entry == override.entry or not (other.entry and override.entry)):
                    raise ValueError(f"{key} is given twice; first by {other.text}")
            _put(tree, override, value.strip())
        except yaml.YAMLError as error:
            problems.append(_Problem(f"override {text}", f"not readable as YAML: {' '.join(str(error).split())}"))
        except ValueError as error:
            problems.append(_Problem(f"override {text}", str(error)))
        else:
            applied.append(override)
    return tree, applied, problems


def _put(tree: dict[str, Any], override: _Override, text: str) -> None:
    """Put the override's value into ``tree``; what follows the key of a mapping is the entry's, dots and all."""
    key, entry = override.key, override.entry
    if key not in _keys():
        raise ValueError(_unknown(key))
    annotation = _keys()[key]
    if is_dataclass(annotation):
        name = next(iter(options_of(annotation)))
        raise ValueError(f"{key} is a section; set one of its keys, for example {key}.{name}=...")
    value = _parse(text, get_args(annotation)[1] if entry else annotation)
    *sections, name = key.split(".")
    node: Any = tree
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            return  # the file holds something else where a section belongs, which is reported when it is built
    if not entry:
        node[name] = value
    elif isinstance(mapping := node.setdefault(name, _defaults()[key]), dict):
        mapping[entry] = value


def _parse(text: str, annotation: Any) -> Any:
    if type(None) in members(annotation) and text in _NULL:
        return None
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'"
    kinds = members(annotation)
    if not quoted and bool not in kinds and any(kind is str or get_origin(kind) is Literal for kind in kinds):
        return text
    if get_origin(annotation) is tuple and not text.startswith("["):
        return [item.strip() for item in text.split(",") if item.strip()]
    return yaml.load(text, _Loader)


# ---- From a tree of plain values to the dataclasses ----------------------------------------------------------------


def _build_all(tree: Mapping[str, Any]) -> tuple[TrainConfig | None, list[str]]:
    problems: list[str] = []
    return _build(TrainConfig, tree, "", problems), problems


def _build(cls: type[Config], tree: Mapping[Any, Any], prefix: str, problems: list[str]) -> Config | None:
    """Return an instance of the dataclass ``cls`` from ``tree``, or None after adding to ``problems``."""
    options = options_of(cls)
    values: dict[str, Any] = {}
    before = len(problems)
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in options:
            problems.append(_unknown(key))
        elif not is_dataclass(options[name]):
            converted = _convert(value, options[name])
            if matches(converted, options[name]):
                values[name] = converted
            else:
                problems.append(mismatch(key, converted, options[name]))
        elif value is not None and not isinstance(value, Mapping):
            problems.append(f"{key} is a section and must hold `key: value` lines; got {value!r}")
        elif (section := _build(options[name], value or {}, f"{key}.", problems)) is not None:
            values[name] = section
    if values.get("loss_type") == "dr_grpo":
        values["max_completion_length"] = 1  # it must have one; TrainConfig puts the generation limit there
    complaints, is_whole = _complaints(cls, values), len(problems) == before
    for line in complaints:
        name = line.split()[0].partition("[")[0]
        if name in values or is_whole:  # else it may be about a default in the place of what was refused
            problems.append(f"{prefix}{line}" if name in options or not prefix else f"{prefix[:-1]}: {line}")
    return cls(**values) if is_whole and not complaints else None


def _complaints(cls: type[Any], values: Mapping[str, Any]) -> list[str]:
    """Return a dataclass's complaints about ``values``; the loss's stops at the first, so each is also tried alone."""
    found: dict[str, None] = {}
    alone = [{"max_completion_length": 1, name: value} for name, value in values.items()]
    for part in [values, *(alone if cls is GRPOLossConfig else [])]:
        try:
            cls(**part)
        except ValueError as error:
            found |= dict.fromkeys(str(error).splitlines())
        else:
            if part is values:
                break
    return list(found)


def _convert(value: Any, annotation: Any) -> Any:
    """Return a value from YAML as ``annotation`` where only the spelling differs; any other as it is."""
    kinds = members(annotation)
    if float in kinds and (number := _number(value)) is not None:
        return number
    if isinstance(value, list) and any(get_origin(kind) is tuple for kind in kinds):
        return tuple(value)
    if isinstance(value, dict) and annotation == dict[str, float]:
        return {name: item if (number := _number(item)) is None else number for name, item in value.items()}
    return value


def _number(value: Any) -> float | None:
    """Return a number that YAML 1.1 read as an int or, as it does with 1e-6, as text; None for anything else."""
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number


# ---- Problems ------------------------------------------------------------------------------------------------------


def _accept(config: TrainConfig | None, problems: Sequence[_Problem]) -> TrainConfig:
    """Return the configuration, or raise ValueError with every problem and its source."""
    if config is not None and not problems:
        return config
    sources = {problem.source for problem in problems}
    common = f"{sources.pop()}: ".removeprefix(": ") if len(sources) == 1 else ""
    lines = [f"{source}: {text}" if source and not common else text for source, text in problems]
    listed = lines if len(lines) == 1 else [f"{len(lines)} problems", *(f"  - {line}" for line in lines)]
    raise ValueError(common + "\n".join(listed))


def _culprit(problem: str, applied: Sequence[_Override]) -> str:
    """Return the overrides that brought the problem about: those whose keys it names before its first semicolon."""
    clause = problem.partition(";")[0]
    named = [o for o in applied if re.search(rf"(?<![\w.]){re.escape(o.key)}(?!\w)", clause)]
    exact = [o for o in named if not o.entry or o.entry in problem] or named
    return f"override {' '.join(o.text for o in exact)}" if exact else "overrides"


@functools.cache
def _keys(cls: Any = TrainConfig, prefix: str = "") -> dict[str, Any]:
    """Return the annotation of every dotted key, sections included."""
    found = {f"{prefix}{name}": annotation for name, annotation in options_of(cls).items()}
    sections: dict[str, Any] = {key: annotation for key, annotation in found.items() if is_dataclass(annotation)}
    for key, section in sections.items():
        found |= _keys(section, f"{key}.")
    return found


def _defaults() -> dict[str, Any]:
    return flatten(to_dict(TrainConfig()))


def _unknown(key: str) -> str:
    """Return the complaint about an unknown key, with the nearest valid ones."""
    if key.startswith("loss.") and (name := key.split(".")[1]) in LOSS_VALUES:
        return f"unknown key {key}; it is {LOSS_VALUES[name]}"
    nearest = _nearest(key)
    return f"unknown key {key}" + (f"; did you mean {' or '.join(nearest)}?" if nearest else "")


def _nearest(key: str) -> list[str]:
    """Return the keys that may be meant: a typo, words in another order, initials (optim.lr), another section."""
    valid = [k for k, annotation in _keys().items() if not is_dataclass(annotation)]
    valid += [f"{k}.{name}" for k, value in _defaults().items() if isinstance(value, dict) for name in value]
    leaves = {k: k.rpartition(".")[2] for k in valid}
    leaf, words = key.rpartition(".")[2], set(re.split(r"[._]", key))
    same_words = [k for k in valid if words >= set(re.split(r"[._]", k))]
    near = difflib.get_close_matches(leaf, set(leaves.values()), 1, cutoff=0.75)
    return (
        difflib.get_close_matches(key, valid, 1, cutoff=0.75)
        or [k for k in same_words if key.endswith(leaves[k])]
        or same_words
        or [k for k in valid if len(leaf) > 1 and leaf == "".join(word[0] for word in leaves[k].split("_"))]
        or [k for k in valid if leaves[k] in near]
    )
