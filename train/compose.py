"""From text to a typed tree: how dataclasses are filled from YAML groups and `key=value` overrides. Knows no setting.

Owns: the kinds of value a setting can have (`Count`, `Positive`, ...) with the words for them, the conversion and check of
plain data against a dataclass, the reading of overrides in Hydra's grammar, the listing of groups and their options,
Hydra's composition of files, reading YAML that is not trusted, plug-ins, and the nearest match to a misspelt name.

Does not own: any setting, group or rule between settings (`config.py`). Torch-free; Hydra is imported where it is used.

Every function that can find something wrong collects it and goes on, so that one message can say all.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")
Options = Mapping[str, Mapping[str, Path]]
"""Group -> option -> its file."""
MAX_YAML_BYTES = 1_000_000


class ConfigError(Exception):
    """The config cannot be used. `problems` has one text each: what was given, what is required, what to type."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(dict.fromkeys(problems))
        head = "The config has a problem:" if len(self.problems) == 1 else f"The config has {len(self.problems)} problems:"
        super().__init__("\n".join([head, *(f"  {problem}" for problem in self.problems)]))


# ----------------------------------------------------------------------------------------------------- kinds of value


@dataclass(frozen=True)
class Rule:
    """A condition on one value, and the words a person reads when it does not hold."""

    text: str
    holds: Callable[[Any], bool]


def pattern(text: str, regex: str) -> Rule:
    """A rule on text: the whole of it matches `regex`."""
    return Rule(text, lambda value: re.fullmatch(regex, value) is not None)


Count = Annotated[int, Rule("1 or more", lambda v: v >= 1)]
Natural = Annotated[int, Rule("0 or more", lambda v: v >= 0)]
Positive = Annotated[float, Rule("above 0", lambda v: v > 0)]
NonNegative = Annotated[float, Rule("0 or more", lambda v: v >= 0)]
Share = Annotated[float, Rule("from 0 to 1", lambda v: 0 <= v <= 1)]
ShareBelow1 = Annotated[float, Rule("from 0 to below 1", lambda v: 0 <= v < 1)]
OpenShare = Annotated[float, Rule("between 0 and 1", lambda v: 0 < v < 1)]
OneLine = Annotated[str, Rule("on one line", str.isprintable)]


def words(hint: Any) -> str:
    """What `hint` asks for, e.g. "a whole number, 1 or more, or null"."""
    args = get_args(hint)
    match get_origin(hint):
        case origin if origin is Annotated:
            return ", ".join([words(args[0]), *(rule.text for rule in args[1:])])
        case origin if origin in (Union, UnionType):
            return " or ".join([words(arg) for arg in args if arg is not NoneType] + ["null"] * (NoneType in args))
        case origin if origin is Literal:
            return ("one of " if len(args) > 1 else "") + ", ".join(args)
        case origin if origin is list:
            return f"a list [...], each {words(args[0])}"
    if is_dataclass(hint):
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
    elif is_dataclass(hint):
        kinds, defaults = _hints(hint), {each.name: _default(each) for each in fields(hint)}
        if isinstance(value, Mapping) and set(value) <= set(kinds):
            return hint(**{name: convert(kind, value.get(name, defaults[name])) for name, kind in kinds.items()})
    elif hint is NoneType:
        if value is None:
            return None
    elif hint is str:
        if isinstance(value, str) and value and not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", value):
            return value
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif not isinstance(value, bool):  # int and float; YAML 1.1 reads 1e-3 as text
        if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value):
            value = float(value) if re.search(r"[.eE]", value) else int(value)
        if isinstance(value, int | float) and math.isfinite(value):
            if hint is float:
                return float(value)
            if value == int(value):
                return int(value)
    raise ValueError(words(hint))


# ----------------------------------------------------------------------------------------------- dataclasses and keys


class Leaf(NamedTuple):
    """A setting: what it may be, and its value when nobody sets it."""

    hint: Any
    default: Any


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _default(of: Field) -> Any:
    return of.default if of.default_factory is MISSING else of.default_factory()


@cache
def leaves(cls: type, prefix: str = "") -> dict[str, Leaf]:
    """Full dotted key -> setting, over the tree of dataclasses below `cls`."""
    found: dict[str, Leaf] = {}
    for each in fields(cls):
        hint, key = _hints(cls)[each.name], prefix + each.name
        found |= leaves(hint, key + ".") if is_dataclass(hint) else {key: Leaf(hint, _default(each))}
    return found


def build(cls: type[T], data: Mapping[str, Any], prefix: str = "") -> tuple[T, list[tuple[str, str]]]:
    """`cls` filled from plain data, and the problems as (key, text). What is wrong or absent keeps its default."""
    problems: list[tuple[str, str]] = []
    values: dict[str, Any] = {}
    keys = [key[len(prefix) :] for key in leaves(cls, prefix)]
    for name, value in data.items():
        key = f"{prefix}{name}"
        hint = _hints(cls).get(name) if isinstance(name, str) else None
        if hint is None:
            problems.append((key, unknown(key, [prefix + k for k in keys])))
        elif is_dataclass(hint):
            if isinstance(value, Mapping):
                values[name], below = build(hint, value, key + ".")  # type: ignore[arg-type]
                problems += below
            else:
                problems.append((key, f"{key}={shown(value)}: {key} is a group of settings, not one value."))
        else:
            try:
                values[name] = convert(hint, value)
            except ValueError:
                problems.append((key, mismatch(key, value, leaves(cls, prefix)[key])))
    return cls(**values), problems


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
    """`data["a"]["b"] = value` for the key `a.b`."""
    *above, last = key.split(".")
    for name in above:
        data = data.setdefault(name, {})
    data[last] = value


# --------------------------------------------------------------------------------------------- what a person is told


def shown(value: Any) -> str:
    """`value` as it would be typed in an override, cut where it is long."""
    if isinstance(value, bool) or value is None:
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


def mismatch(key: str, value: Any, leaf: Leaf) -> str:
    """The text for a value that does not fit its setting."""
    text = f"{key}={shown(value)}: must be {words(leaf.hint)}"
    choices = [a for h in (leaf.hint, *get_args(leaf.hint)) if get_origin(h) is Literal for a in get_args(h)]
    if isinstance(value, str) and (close := nearest(value, choices)):
        return f"{text}. Did you mean {key}={close}?"
    if leaf.default is not None and leaf.default != [] and leaf.default != value and not choices:
        return f"{text}, for example {key}={shown(leaf.default)}"
    return text + "."


def unknown(key: str, keys: Sequence[str], synonyms: Mapping[str, str] | None = None, value: str = "") -> str:
    """The text for a setting that does not exist, with the nearest that does."""
    given = f"{shown(key)}{value}: there is no setting {shown(key)}"
    *above, last = key.split(".")
    if key.endswith("_target_"):
        return f"{given}, and nothing in a config names code to run: `--plugin` on the command line does."
    if advice := (synonyms or {}).get(last.lower().replace("-", "_")):
        return f"{given}. {advice}"
    siblings = [k for k in keys if k.split(".")[:-1] == above]
    namesakes = [k for k in keys if k.split(".")[-1] == last]
    close = nearest(key, namesakes, cutoff=0.0) or nearest(key, siblings, cutoff=0.7) or nearest(key, keys)
    if close is None and (named := nearest(last, {k.split(".")[-1] for k in keys}, cutoff=0.75)):
        close = next(k for k in keys if k.split(".")[-1] == named)
    if close:
        return f"{given}. Did you mean {close}{value}?"
    if siblings and above:
        return f"{given}. The settings of {'.'.join(above)} are {', '.join(k.split('.')[-1] for k in siblings)}."
    return f"{given}. All settings are in docs/config.md."


# ----------------------------------------------------------------------------------------------------------- overrides


@dataclass
class Request:
    """What a command line asks for. Values are checked and converted, except those that hold a `${reference}`."""

    choices: dict[str, str | list[str]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def request(
    overrides: Sequence[str],
    known: Mapping[str, Leaf],
    options: Options,
    *,
    several: Sequence[str] = (),
    synonyms: Mapping[str, str] | None = None,
) -> Request:
    """Read overrides in Hydra's grammar, and check each against the settings and the options of each group.

    several: groups that take a list of options, as in `tracker=[wandb,tensorboard]`. The last of two overrides of one
    key holds. What is wrong is left out and described in `problems`.
    """
    asked = Request()
    if not overrides:
        return asked
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    groups = {key.split(".")[0] for key in known if "." in key}
    for line in overrides:
        try:
            one = parser.parse_override(line)
            value = one.value()
        except (HydraException, ValueError, RecursionError) as error:
            asked.problems.append(_syntax(line, known, error))
            continue
        key, text = one.key_or_group, line.partition("=")[2].strip()
        if key.partition(".")[0].partition("/")[0] == "hydra":
            problem = f"{shown(line)}: Hydra's own settings are not used here; `gearshift run -m` sweeps."
        elif one.package is not None:
            problem = f"{shown(line)}: a group has one place; write {key}={shown(text)}"
        elif one.type is OverrideType.DEL:
            empty = {k: leaf.default for k, leaf in known.items() if k == key and leaf.default in (None, [])}
            instead = f"write {key}={shown(empty[key])}" if empty else "set it to another value"
            problem = f"{shown(line)}: nothing can be taken away; {instead}" + (
                f", one of {', '.join(options[key])}." if key in options else "."
            )
        elif one.is_sweep_override():
            problem = (
                f"{shown(line)}: several values are a sweep: gearshift run -m {shown(line)}. "
                f"A list is {key}=[...], text with a comma {key}='\"...\"'."
            )
        elif key in options:
            problem = _choose(asked, key, value, text, options[key], several=key in several)
        elif key in known:
            problem = _set(asked, key, value, text, known[key])
        elif key in groups:
            problem = f"{shown(line)}: {key} is a group of settings: set one of them, such as " + next(
                f"{k}={shown(leaf.default)}" for k, leaf in known.items() if k.startswith(key + ".")
            )
        elif whole := next((k for k in known if key.startswith((k + ".", k + "["))), None):
            problem = f"{shown(line)}: {whole} is set as a whole, as {words(known[whole].hint)}."
        else:
            problem = unknown(key, [*known, *options], synonyms, f"={text}")
        if problem:
            asked.problems.append(problem)
    return asked


def _syntax(line: str, known: Mapping[str, Leaf], error: Exception) -> str:
    """The text for an override that Hydra's grammar refuses."""
    if line.startswith("-"):
        return f"{shown(line)}: settings are written key=value, without dashes."
    if "=" not in line:
        example = line if line in known else "optim.lr"
        return f"{shown(line)}: a setting is written key=value, such as {example}={shown(known[example].default)}"
    key, _, value = line.partition("=")
    if re.fullmatch(r"[+~]*[\w./]+", key) and not re.search(r"[\"\[\]{}]", value):
        return f"{shown(line)}: this value needs quotes: {key}='\"{shown(value)}\"'"
    reason = (str(error).splitlines() or [""])[0]
    return f"{shown(line)}: not a setting in the form key=value ({reason})."


def _choose(asked: Request, group: str, value: Any, text: str, options: Mapping[str, Path], several: bool) -> str | None:
    """Note the option of a group, or say what is wrong with it."""
    given = value if isinstance(value, list) and several else [text if isinstance(value, int | float) else value]
    for option in given:
        if not isinstance(option, str):
            hint = f"a list of options, such as {group}=[{','.join(list(options)[:2])}]" if several else "one option"
            return f"{group}={shown(value)}: {group} takes {hint}; its settings are set one by one as {group}.KEY=VALUE."
        if option not in options:
            close = nearest(option, options)
            meant = f" Did you mean {group}={close}?" if close else ""
            return f"{group}={shown(option)}: there is no {group} {shown(option)}.{meant} There are {', '.join(options)}."
    asked.choices[group] = given if isinstance(value, list) else given[0]
    return None


def _set(asked: Request, key: str, value: Any, text: str, leaf: Leaf) -> str | None:
    """Note the value of a setting, or say what is wrong with it."""
    if isinstance(value, str) and "${" in value:
        asked.values[key] = value
        return None
    for candidate in (value, text) if isinstance(value, int | float) else (value,):  # run.name=007 is text
        try:
            asked.values[key] = convert(leaf.hint, candidate)
            return None
        except ValueError:
            continue
    return mismatch(key, value, leaf)


# --------------------------------------------------------------------------------------------------- files and Hydra


def find_options(roots: Sequence[Path]) -> dict[str, dict[str, Path]]:
    """The options of each group: the YAML files one directory below `roots`; earlier roots win, as in Hydra."""
    found: dict[str, dict[str, Path]] = {}
    for root in roots:
        for path in sorted(root.glob("*/*.yaml")):
            found.setdefault(path.parent.name, {}).setdefault(path.stem, path)
    return found


def compose_files(
    main: Path, schema: Mapping[str, Any], choices: Mapping[str, str | list[str]], extra: Path | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Hydra's composition of the file `main` with these options: (plain data, references unresolved; every choice).

    schema: stored as the config `schema`, the first in the defaults list of `main`. extra: another root of groups.
    A group that is not in that defaults list is added. Raises ConfigError.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    ConfigStore.instance().store(name="schema", node=dict(schema), provider="gearshift")
    listed = set(re.findall(r"^\s*- (\w+):", main.read_text(), re.MULTILINE))
    overrides = [f"{'' if group in listed else '+'}{group}={shown(option)}" for group, option in choices.items()]
    if extra is not None:
        overrides.append(f"hydra.searchpath=['file://{extra}']")
    try:
        with initialize_config_dir(str(main.parent), version_base="1.3"):
            composed = compose(main.stem, overrides, return_hydra_config=True)
        chosen = dict(composed.hydra.runtime.choices)
        OmegaConf.set_struct(composed, False)
        del composed["hydra"]
        data = OmegaConf.to_container(composed, resolve=False)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())
        raise ConfigError([f"the files of {main.parent}{f' and {extra}' if extra else ''} do not compose: {reason}"]) from error
    assert isinstance(data, dict)
    return data, chosen  # type: ignore[return-value]


def resolve(data: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """`data` with each `${other.key}` replaced by the value it names, and the problems as (key, text).

    Resolvers (`${oc.env:HOME}`, `${now:...}`) are refused: a setting never comes from the environment or the clock. A
    value that does not resolve is dropped.
    """
    references = [(key, value) for key, value in items(data) if isinstance(value, str) and "${" in value]
    if not references:
        return data, []
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    problems: list[tuple[str, str]] = []
    literal = r"A literal ${ is written \${"
    for key, value in references:
        reason = None
        if re.search(r"(?<!\\)\$\{[^}]*:", value):
            reason = "settings never come from the environment, the clock or a function; write the value"
        else:
            try:
                OmegaConf.select(OmegaConf.create(data), key, throw_on_missing=True)
            except OmegaConfBaseException as error:
                reason = str(error).splitlines()[0]
        if reason:
            problems.append((key, f"{key}={shown(value)}: {reason}. {literal}"))
            top = re.split(r"\[", key)[0]
            *above, last = top.split(".")
            holder = data
            for name in above:
                holder = holder[name]
            holder.pop(last, None)
    resolved = OmegaConf.to_container(OmegaConf.create(data), resolve=True)
    assert isinstance(resolved, dict)
    return resolved, problems  # type: ignore[return-value]


class _PlainLoader(yaml.SafeLoader):
    """YAML as plain data: no anchors, aliases or tags, no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None or event.tag is not None:
            raise yaml.YAMLError(f"anchors, aliases and tags are not used here{event.start_mark}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        result = super().construct_mapping(node, deep)
        if len(result) < len(node.value):
            raise yaml.YAMLError(f"a key is there twice{node.start_mark}")
        return result


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping of plain data from a file that need not be trusted. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_YAML_BYTES + 1)
        if len(content) > MAX_YAML_BYTES:
            raise ConfigError([f"{path}: larger than {MAX_YAML_BYTES} bytes; no config is."])
        data = yaml.load(content.decode(), _PlainLoader)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError([f"{path}: cannot be read as a config: {reason}"]) from error
    if not isinstance(data, dict) and data is not None:
        raise ConfigError([f"{path}: must hold groups of settings, as `group:` and below it `key: value`."])
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
        raise ConfigError([f"--plugin {shown(name)}: must be the name of a module, such as my_package or my_package.models"])
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        where = f"{error.name} is neither installed nor in {os.getcwd()}"
        raise ConfigError([f"--plugin {name}: {where}. Add its directory to PYTHONPATH, or install it."]) from error
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
        raise ConfigError([f"--plugin {name}: fails when it is imported: {reason}"]) from error
    PLUGINS[name] = _source_hash(name)
    return PLUGINS[name]


def _source_hash(name: str) -> str:
    """sha256 over the Python files of a module or package, names and contents, wherever it lies."""
    module = sys.modules[name]
    roots = [Path(root) for root in getattr(module, "__path__", [])]
    paths = [(path.relative_to(root), path) for root in roots for path in root.rglob("*.py")]
    paths = paths or [(Path(Path(str(module.__file__)).name), Path(str(module.__file__)))]
    digest = hashlib.sha256()
    for relative, path in sorted(paths):
        content = path.read_bytes()
        digest.update(f"{relative.as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
