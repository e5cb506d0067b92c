"""From text to a typed tree: how dataclasses are filled from YAML groups and `key=value` overrides. Knows no setting.

Owns: the kinds of value (`Count`, `Positive`, ...) with the words for them, the check and conversion of plain data
against a dataclass, overrides in Hydra's grammar, the options of each group, Hydra's composition of files, YAML that is
not trusted, plug-ins, and the nearest match to a misspelt name.

Does not own: any setting, group or rule between settings (`config.py`). Torch-free; Hydra is imported where it is used.

What can be wrong in several places is collected, so that one message says all of it.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")
MAX_YAML_BYTES = 200_000


class ConfigError(Exception):
    """The config cannot be used. `problems` has one text each: what was given, what is required, what to type."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(dict.fromkeys(problems))
        count = "a problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"The config has {count}:", *(f"  {problem}" for problem in self.problems)]))


# ----------------------------------------------------------------------------------------------------- kinds of value


@dataclass(frozen=True)
class Rule:
    """A condition on one value, and the words a person reads when it does not hold."""

    text: str
    holds: Callable[[Any], bool]


def matches(text: str, regex: str) -> Rule:
    """A rule that the whole of a text follows `regex`."""
    return Rule(text, lambda value: re.fullmatch(regex, value) is not None)


def parses(text: str, parse: Callable[[str], object]) -> Rule:
    """A rule that `parse` takes the text without a ValueError."""

    def holds(value: str) -> bool:
        try:
            parse(value)
        except ValueError:
            return False
        return True

    return Rule(text, holds)


Count = Annotated[int, Rule("1 or more", lambda v: v >= 1)]
Natural = Annotated[int, Rule("0 or more", lambda v: v >= 0)]
Positive = Annotated[float, Rule("above 0", lambda v: v > 0)]
NonNegative = Annotated[float, Rule("0 or more", lambda v: v >= 0)]
Share = Annotated[float, Rule("from 0 to 1", lambda v: 0 <= v <= 1)]
ShareBelow1 = Annotated[float, Rule("from 0 to below 1", lambda v: 0 <= v < 1)]
OneLine = Annotated[str, Rule("on one line", str.isprintable)]


def words(hint: Any) -> str:
    """What `hint` asks for, e.g. "a whole number, 1 or more, or null"."""
    args, origin = get_args(hint), get_origin(hint)
    if origin is Annotated:
        return words(args[0]) + (" " if args[0] is str else ", ") + ", ".join(rule.text for rule in args[1:])
    if origin in (Union, UnionType):
        return " or ".join(words(arg) for arg in args if arg is not NoneType) + ", or null" * (NoneType in args)
    if origin is Literal:
        return "one of " * (len(args) > 1) + ", ".join(args)
    if origin is list:
        return f"a list [...] with each {words(args[0])}"
    if _is_group(hint):
        return "{" + ", ".join(f"{name}: {words(kind)}" for name, kind in _hints(hint).items()) + "}"
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}[hint]


def convert(hint: Any, value: Any) -> Any:
    """`value` as the type that `hint` asks for. Raises ValueError, whose text says what is required."""
    args, origin = get_args(hint), get_origin(hint)
    if origin is Annotated:
        result = convert(args[0], value)
        if all(rule.holds(result) for rule in args[1:]):
            return result
    elif origin in (Union, UnionType):
        for member in args:
            try:
                return convert(member, value)
            except ValueError:
                continue
    elif origin is Literal:
        if isinstance(value, str) and value in args:
            return value
    elif origin is list:
        if isinstance(value, list):
            return [convert(args[0], item) for item in value]
    elif _is_group(hint):
        settings = leaves(hint)
        if isinstance(value, Mapping) and set(value) <= set(settings):
            return hint(**{k: convert(leaf.hint, value.get(k, leaf.default)) for k, leaf in settings.items()})  # type: ignore[operator]
    elif hint in (NoneType, bool):
        if isinstance(value, hint):
            return value
    elif hint is str:
        if isinstance(value, str) and value and not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", value):
            return value
    elif not isinstance(value, bool):
        # YAML 1.1 reads 1e-3 as text.
        if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value):
            value = float(value) if re.search(r"[.eE]", value) else int(value)
        if (
            isinstance(value, int | float)
            and abs(value) <= sys.float_info.max
            and (hint is float or value == int(value))
        ):
            return hint(value)
    raise ValueError(words(hint))


# ----------------------------------------------------------------------------------------------- dataclasses and keys


class Leaf(NamedTuple):
    """A setting: what it may be, and its value when nobody sets it."""

    hint: Any
    default: Any


def _is_group(hint: Any) -> bool:
    return is_dataclass(hint)


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


@cache
def leaves(cls: Any, prefix: str = "") -> dict[str, Leaf]:
    """Full dotted key -> setting, over the tree of dataclasses below `cls`."""
    found: dict[str, Leaf] = {}
    for each in fields(cls):
        hint, key = _hints(cls)[each.name], prefix + each.name
        if _is_group(hint):
            found |= leaves(hint, key + ".")
        else:
            found[key] = Leaf(hint, each.default if each.default_factory is MISSING else each.default_factory())
    return found


def build(cls: type[T], data: Mapping[Any, Any]) -> tuple[T, list[tuple[str, str]]]:
    """`cls` filled from nested plain data, and the problems as (key, text). What is wrong keeps its default."""
    problems: list[tuple[str, str]] = []
    settings = leaves(cls)  # type: ignore[arg-type]

    def fill(part: type, values: Mapping[Any, Any], prefix: str) -> Any:
        found: dict[str, Any] = {}
        for name, value in values.items():
            key, hint = f"{prefix}{name}", _hints(part).get(name)
            if hint is None:
                problems.append((key, unknown(key, list(settings))))
            elif _is_group(hint) and isinstance(value, Mapping):
                found[name] = fill(hint, value, key + ".")
            elif _is_group(hint):
                problems.append((key, f"{key}={shown(value)}: {key} is a group of settings, not one value."))
            else:
                try:
                    found[name] = convert(hint, value)
                except ValueError:
                    problems.append((key, mismatch(key, value, settings[key])))
        return part(**found)

    return fill(cls, data, ""), problems


def items(data: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value in nested plain data; items of lists as `key[0]`."""
    if isinstance(data, Mapping) and data:
        for name, value in data.items():
            yield from items(value, f"{key}.{name}" if key else str(name))
    elif isinstance(data, list) and data:
        for number, value in enumerate(data):
            yield from items(value, f"{key}[{number}]")
    else:
        yield key, data


def assign(data: dict[str, Any], key: str, value: Any) -> None:
    """`data["a"]["b"] = value` for the key `a.b`. Nothing where `a` is no group: `build` says so."""
    *above, last = key.split(".")
    for name in above:
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            return
    data[last] = value


# ------------------------------------------------------------------------------------------------ what a person is told


def shown(value: Any) -> str:
    """`value` as it would be typed in an override; cut where it is long, control characters made visible."""
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, Mapping):
        text = "{" + ",".join(f"{name}:{shown(item)}" for name, item in value.items()) + "}"
    elif isinstance(value, list):
        text = "[" + ",".join(map(shown, value)) + "]"
    else:
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value)) or "''"
    return text if len(text) <= 120 else text[:117] + "..."


def nearest(word: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The candidate most like `word`, or None."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[close[0]] if close else None


def _names(hint: Any) -> list[str]:
    """The names that a value, or an item of it, may be."""
    return list(get_args(hint)) if get_origin(hint) is Literal else [n for arg in get_args(hint) for n in _names(arg)]


def mismatch(key: str, value: Any, leaf: Leaf) -> str:
    """The text for a value that does not fit its setting."""
    text = f"{key}={shown(value)}: must be {words(leaf.hint)}"
    given = [word for word in (value if isinstance(value, list) else [value]) if isinstance(word, str)]
    close = [nearest(word, _names(leaf.hint)) for word in given]
    for likely in (close[0] if close else None, close, [value], leaf.default):
        if likely and likely != value:
            try:
                convert(leaf.hint, likely)
            except ValueError:
                continue
            if likely is leaf.default:
                return f"{text}, for example {key}={shown(likely)}"
            return f"{text}. Did you mean {key}={shown(likely)}?"
    return text + "."


def unknown(key: str, keys: Sequence[str], synonyms: Mapping[str, str] | None = None, value: str = "") -> str:
    """The text for a setting that does not exist, with the nearest that does."""
    given = f"{shown(key)}{value}: there is no setting {shown(key)}"
    *above, last = key.split(".")
    if key.endswith("_target_"):
        return f"{given}, and nothing in a config names code to run; `--plugin` on the command line does."
    if advice := (synonyms or {}).get(last.lower()):
        return f"{given}. Here it is {advice}."
    last_words = {each.split(".")[-1]: each for each in keys}
    siblings = [each for each in keys if each.split(".")[:-1] == above]
    close = (
        nearest(key, [each for each in keys if each.split(".")[-1] == last], cutoff=0.0)
        or nearest(key, siblings, cutoff=0.75)
        or nearest(key, keys, cutoff=0.8)
        or last_words.get(nearest(last, last_words, cutoff=0.75) or "")
    )
    if close:
        return f"{given}. Did you mean {close}{value}?"
    if siblings and above:
        return f"{given}. The settings of {'.'.join(above)} are {', '.join(each.split('.')[-1] for each in siblings)}."
    return f"{given}. All settings are in docs/config.md."


# ----------------------------------------------------------------------------------------------------------- overrides


@dataclass
class Asked:
    """What a command line asks for: options of groups, values of settings, and what was wrong with the rest."""

    choices: dict[str, str | list[str]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_overrides(
    overrides: Sequence[str],
    known: dict[str, Leaf],
    options: Mapping[str, Mapping[str, Path]],
    *,
    several: Sequence[str] = (),
    synonyms: Mapping[str, str] | None = None,
) -> Asked:
    """Read overrides in Hydra's grammar, each checked against the settings and the options of each group.

    several: groups that take a list of options, as in `tracker=[wandb,tensorboard]`. Of two overrides of one key the
    later holds. What is wrong is left out and described in `problems`.
    """
    asked = Asked()
    if not overrides:
        return asked
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    groups = {key.partition(".")[0]: key for key in reversed(known) if "." in key}
    for line in overrides:
        try:
            one = parser.parse_override(line)
            value = one.value()
        except (HydraException, ValueError, RecursionError) as error:
            asked.problems.append(_not_parsed(line, error, known, options))
            continue
        key, text = one.key_or_group, line.partition("=")[2].strip()
        whole = next((each for each in known if key.startswith((each + ".", each + "["))), None)
        problem: str | None
        if re.match(r"hydra\b", key):
            problem = f"{shown(line)}: Hydra's own settings are not used here; `gearshift run -m` sweeps."
        elif one.package is not None:
            problem = f"{shown(line)}: a group has one place; write {key}={shown(text)}"
        elif one.type is OverrideType.DEL:
            instead = (
                f"choose one of {', '.join(options[key])}" if key in options else f"set {key} to a value, or to null"
            )
            problem = f"{shown(line)}: nothing can be taken away; {instead}."
        elif one.is_sweep_override():
            alone = f"For one run, a list is {key}=[...], text with a comma {key}='\"...\"'"
            problem = f"{shown(line)}: several values are a sweep: gearshift run -m {shown(line)}. {alone}"
        elif key in options:
            problem = _choose(asked, key, value, text, options[key], key in several)
        elif key in known:
            problem = _set(asked, key, value, text, known[key])
        elif key in groups:
            problem = f"{shown(line)}: {key} is a group; set what is in it, such as {groups[key]}."
        elif whole:
            problem = f"{shown(line)}: {whole} is set as a whole, to {words(known[whole].hint)}."
        else:
            problem = unknown(key, [*known, *options], synonyms, f"={shown(text)}")
        if problem:
            asked.problems.append(problem)
    return asked


def _not_parsed(line: str, error: Exception, known: Mapping[str, Leaf], options: Mapping[str, Any]) -> str:
    """The text for an override that Hydra's grammar refuses."""
    key, equals, value = line.partition("=")
    if line.startswith("-"):
        return f"{shown(line)}: settings are written key=value, without dashes."
    if not equals:
        example = next(iter(options[key])) if key in options else shown(known[key].default) if key in known else "VALUE"
        return f"{shown(line)}: a setting is written key=value, as in {shown(key)}={example}"
    if key in known and not re.search(r"[\"'\[\]{}]", value):
        return f"{shown(line)}: this value needs quotes: {key}='\"{shown(value)}\"'"
    return f"{shown(line)}: cannot be read: {shown((str(error).splitlines() or [''])[0])}"


def _choose(asked: Asked, group: str, value: Any, text: str, options: Mapping[str, Path], several: bool) -> str | None:
    """Note the option of a group, or say what is wrong with it."""
    given = value if several and isinstance(value, list) else [text if isinstance(value, int | float) else value]
    for option in given:
        if not isinstance(option, str):
            return f"{group}={shown(value)}: {group} takes the name of an option; its settings are {group}.KEY."
        if option not in options:
            close = nearest(option, options)
            meant = f" Did you mean {group}={close}?" if close else ""
            return f"{group}={shown(option)}: there is no such {group}.{meant} There are {', '.join(options)}."
    asked.choices[group] = given if isinstance(value, list) else given[0]
    return None


def _set(asked: Asked, key: str, value: Any, text: str, leaf: Leaf) -> str | None:
    """Note the value of a setting, or say what is wrong with it. A `${reference}` is checked when it is resolved."""
    if isinstance(value, str) and "${" in value:
        asked.values[key] = value
        return None
    for candidate in (value, text) if isinstance(value, int | float) else (value,):  # run.name=007 is text
        try:
            convert(leaf.hint, candidate)
        except ValueError:
            continue
        asked.values[key] = candidate
        return None
    return mismatch(key, value, leaf)


# --------------------------------------------------------------------------------------------------- files and Hydra


def find_options(*roots: Path) -> dict[str, dict[str, Path]]:
    """Group -> option -> file: the YAML files one directory below `roots`; earlier roots win, as in Hydra."""
    found: dict[str, dict[str, Path]] = {}
    for root in roots:
        for path in sorted(root.glob("*/*.yaml")):
            found.setdefault(path.parent.name, {}).setdefault(path.stem, path)
    return found


def compose_files(
    main: Path, schema: Mapping[str, Any], choices: Mapping[str, str | list[str]], extra: Path | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Hydra's composition of the file `main` with these options: (plain data, references unresolved; every choice).

    schema: stored as the config `schema`, the first in the defaults list of `main`. extra: another root of groups; a
    group that is not in the schema is added. Raises ConfigError.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    ConfigStore.instance().store(name="schema", node=dict(schema), provider="gearshift")
    overrides = [f"{'' if group in schema else '+'}{group}={shown(option)}" for group, option in choices.items()]
    if extra is not None:
        quoted = str(extra).replace("\\", "\\\\").replace("'", "\\'")
        overrides.append(f"hydra.searchpath=['file://{quoted}']")
    try:
        with initialize_config_dir(str(main.parent), version_base="1.3"):
            composed = compose(main.stem, overrides, return_hydra_config=True)
        chosen = dict(composed.hydra.runtime.choices)
        OmegaConf.set_struct(composed, False)
        del composed["hydra"]
        data: Any = OmegaConf.to_container(composed, resolve=False)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError) as error:
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())
        where = f"{main.parent} and {extra}" if extra else str(main.parent)
        raise ConfigError([f"The files of {where} do not compose: {reason}"]) from error
    return data, chosen


def resolve(data: dict[str, Any], only: Iterable[str] | None = None) -> list[tuple[str, str]]:
    """Replace each `${other.key}` in `data` by the value it names; the problems as (key, text), their values dropped.

    Hydra's resolvers (`${oc.env:HOME}`, `${now:...}`) are refused: no setting comes from the environment, the clock or
    a function. only: the settings in which `${` is a reference, else all.
    """
    problems: list[tuple[str, str]] = []
    allowed = None if only is None else set(only)

    def value_of(key: str, seen: tuple[str, ...]) -> Any:
        if ":" in key:
            raise ValueError("a setting never comes from the environment, the clock or a function; write the value")
        if key in seen:
            raise ValueError(f"{key} refers to itself")
        value: Any = data
        for name in key.split("."):
            if not isinstance(value, Mapping) or name not in value:
                raise ValueError(f"there is no setting {shown(key)}")
            value = value[name]
        return expand(value, (*seen, key)) if allowed is None or key in allowed else value

    def expand(value: Any, seen: tuple[str, ...]) -> Any:
        if isinstance(value, list):
            return [expand(item, seen) for item in value]
        if isinstance(value, Mapping):
            return {name: expand(item, seen) for name, item in value.items()}
        if not isinstance(value, str):
            return value
        if whole := re.fullmatch(r"\$\{([^{}]*)\}", value):
            return value_of(whole[1], seen)
        parts = re.split(r"(\\?\$\{(?:[^{}]*\})?)", value)
        for place, part in enumerate(parts):
            if part.startswith("\\${"):
                parts[place] = part[1:]
            elif part.startswith("${"):
                parts[place] = shown(value_of(part[2:-1] if part.endswith("}") else part, seen))
        return "".join(parts)

    def visit(holder: dict[str, Any], prefix: str) -> None:
        for name, value in list(holder.items()):
            key = f"{prefix}{name}"
            if isinstance(value, dict):
                visit(value, key + ".")
            elif "${" in str(value) and (allowed is None or key in allowed):
                try:
                    holder[name] = expand(value, (key,))
                except ValueError as error:
                    problems.append((key, f"{key}={shown(holder.pop(name))}: {error}. For a literal ${{ write \\${{"))

    visit(data, "")
    return problems


class _PlainLoader(yaml.SafeLoader):
    """YAML as plain data: no anchors, aliases or tags, no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None or event.tag is not None:
            raise yaml.YAMLError(f"anchors, aliases and tags are not used here {event.start_mark}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        result = super().construct_mapping(node, deep)
        if len(result) < len(node.value):
            raise yaml.YAMLError(f"a key is there twice {node.start_mark}")
        return result


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping of plain data from a file that need not be trusted. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_YAML_BYTES + 1)
        if len(content) > MAX_YAML_BYTES:
            raise ValueError(f"larger than {MAX_YAML_BYTES} bytes, and no config is")
        data = yaml.load(content.decode(), _PlainLoader)
        if data is not None and not isinstance(data, dict):
            raise ValueError("must hold `group:` and below it `key: value`")
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split()) or "nested too deep"
        raise ConfigError([f"{path}: cannot be read as a config: {reason}"]) from error
    return data or {}


# ------------------------------------------------------------------------------------------------------------ plug-ins

PLUGINS: dict[str, str] = {}
"""Plug-ins that this process imported: name -> sha256 of their source."""


def import_plugin(name: str) -> str:
    """Import a package or module of the user's, from the Python path or the current directory; sha256 of its source.

    It may add entries to the dicts of models, tasks and kinds of data. The name comes from the command line or from
    GEARSHIFT_PLUGIN, never from a file. Raises ConfigError.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
        raise ConfigError([f"--plugin {shown(name)}: must be the name of a module, such as my_package.models"])
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        where = f"{error.name} is neither installed nor in {os.getcwd()}"
        raise ConfigError([f"--plugin {name}: {where}; add its directory to PYTHONPATH, or install it."]) from error
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
        raise ConfigError([f"--plugin {name}: fails when it is imported: {reason}"]) from error
    roots = [Path(root) for root in getattr(module, "__path__", [])]
    sources = [(path.relative_to(root).as_posix(), path) for root in roots for path in root.rglob("*.py")]
    digest = hashlib.sha256()
    for relative, path in sorted(sources) or [("", Path(str(module.__file__)))]:
        content = path.read_bytes()
        digest.update(f"{relative}\0{len(content)}\0".encode() + content)
    PLUGINS[name] = digest.hexdigest()
    return PLUGINS[name]
