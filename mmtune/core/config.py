"""YAML and `key=value` into dataclasses, with every fault gathered and named by file and line.

This file knows no part's options: a field whose type depends on a name next to it says so in its
metadata, `field(metadata=chosen_by("tuner", TUNERS))`. A field that names a file of values to start from does
so too: `field(default=None, metadata=presets_in(folder))`.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from mmtune.core.errors import Fault, UserError
from mmtune.core.files import read_text
from mmtune.core.table import Table, nearest

Path_ = tuple[str, ...]
Report = Callable[..., None]
"""What an options class's `check` is given to tell of a fault: fault(field, what, mend). With absent=True it
tells of a file or folder that the config names and that is not there, or not yet in mmtune's form.
"""

MOST_ENTRIES = 100_000
COMMAND_LINE = 0  # stands for the line of what an override gave


class Source:
    """A parsed YAML file with the line of every key, and the overrides laid over it.

    absent: gathers what is not there (see `Report`), which is no fault then.
    """

    absent: list[Fault] | None = None

    def __init__(self, path: Path, overrides: list[str] | None = None) -> None:
        self.path = Path(path)
        self.lines: dict[Path_, int] = {}
        self._entries = 0
        self.faults: list[Fault] = []
        self.tree = self._read()
        for override in overrides or []:
            self._override(override)

    @classmethod
    def parsed(cls, path: Path, tree: Any) -> Source:
        """A file that was parsed already, the lines of its keys unknown."""
        made = cls.__new__(cls)
        made.path, made.tree, made.lines, made.faults = path, tree, {}, []
        return made

    def where(self, key: Path_) -> str:
        """File, line and dotted key of an entry, as far as they are known."""
        known = key
        while known and known not in self.lines:
            known = known[:-1]
        return self._place(self.lines.get(known), key)

    def _place(self, line: int | None, key: Path_) -> str:
        if line == COMMAND_LINE:
            place = "command line"
        else:
            place = f"{self.path}, line {line}" if line else str(self.path)
        return f"{place}, {'.'.join(key)}" if key else place

    def fault(self, key: Path_, what: str, mend: str = "") -> None:
        self.faults.append(Fault(what, self.where(key), mend))

    def _read(self) -> Any:
        try:
            node = yaml.compose(read_text(self.path), Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else "?"
            problem = str(error.problem)
            mend = "Indent with spaces: YAML takes no tabs." if "'\\t'" in problem else "Mend that line."
            raise UserError(
                f"not valid YAML: {problem}", where=f"{self.path}, line {line}", mend=mend
            ) from None
        except yaml.YAMLError as error:  # a control character
            said = str(error).splitlines()[0]
            raise UserError(f"not valid YAML: {said}", where=self.path, mend="Is it a text file?") from None
        except RecursionError:
            raise UserError(
                "not valid YAML: it is nested too deeply", where=self.path, mend="Is it the file you mean?"
            ) from None
        if node is None:
            raise UserError("the file is empty", where=self.path, mend="Was it written whole?")
        return self._build(node, (), lambda mark: mark.line + 1)

    def _build(
        self, node: yaml.Node, key: Path_, line_of: Callable[[Any], int], within: tuple[yaml.Node, ...] = ()
    ) -> Any:
        self.lines.setdefault(key, line_of(node.start_mark))
        if any(node is outer for outer in within):
            self.fault(key, "an alias stands inside itself", "Write its value out.")
            return None
        self._entries += 1
        if self._entries > MOST_ENTRIES:
            raise UserError(
                f"more than {MOST_ENTRIES} entries", where=self.path, mend="Do aliases multiply each other?"
            )
        within = (*within, node)
        if isinstance(node, yaml.MappingNode):
            mapping: dict[str, Any] = {}
            for name_node, value_node in node.value:
                if not isinstance(name_node, yaml.ScalarNode) or name_node.value == "<<":
                    what = "merge keys (<<) are not read" if name_node.value == "<<" else "a key must be text"
                    self.faults.append(
                        Fault(what, self._place(line_of(name_node.start_mark), key), "Write the keys out.")
                    )
                    continue
                name = str(name_node.value)
                inner = (*key, name)
                line = line_of(name_node.start_mark)
                if name in mapping:
                    first = f", first in line {self.lines[inner]}" if self.lines[inner] else ""
                    self.faults.append(
                        Fault(
                            f"the key is given twice{first}", self._place(line, inner), "Keep one of the two."
                        )
                    )
                self.lines[inner] = line
                mapping[name] = self._build(value_node, inner, line_of, within)
            return mapping
        if isinstance(node, yaml.SequenceNode):
            return [self._build(item, (*key, str(i)), line_of, within) for i, item in enumerate(node.value)]
        try:
            value = yaml.SafeLoader("").construct_object(node)
        except (yaml.YAMLError, ValueError):  # an unknown !tag, a date such as 2026-13-01
            self.fault(key, f"'{node.value}' is no value of YAML", "Put it in quotes if it is text.")
            return None
        # 010 is 8 in YAML 1.1, and 1:30 is 90.
        if type(value) is int and str(value) != node.value.replace("_", "").lstrip("+"):
            self.fault(key, f"{node.value} would be read as {value}", f"Write {value}, or put it in quotes.")
        # YAML 1.1 reads 2e-4 (no dot) as text; everybody who writes it means a number.
        if isinstance(value, str) and getattr(node, "style", None) is None:
            value = _number_or_text(value)
        return value

    def _override(self, override: str) -> None:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            self.faults.append(
                Fault(
                    f"'{override}' is no override",
                    "command line",
                    "Write key=value, for example train.clip=1.0.",
                )
            )
            return
        key = tuple(dotted.split("."))
        self.lines = {known: line for known, line in self.lines.items() if known[: len(key)] != key}
        self.lines[key] = COMMAND_LINE
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except (yaml.YAMLError, RecursionError):
            value: Any = text
        else:
            value = None if node is None else self._build(node, key, lambda mark: COMMAND_LINE)
        holder = self.tree
        for i, name in enumerate(key):
            last = i == len(key) - 1
            if isinstance(holder, list):
                if not name.isdigit() or int(name) >= len(holder):
                    self.faults.append(
                        Fault(
                            f"'{name}' is no position in this list of {len(holder)}",
                            f"command line, {dotted}",
                        )
                    )
                    return
                if last:
                    holder[int(name)] = value
                else:
                    holder = holder[int(name)]
            elif isinstance(holder, dict):
                if last:
                    holder[name] = value
                else:
                    if name not in holder:
                        holder[name] = {}
                        self.lines[key[: i + 1]] = COMMAND_LINE
                    holder = holder[name]
            else:
                self.faults.append(
                    Fault(
                        f"'{'.'.join(key[:i])}' holds a plain value, so it has no '{name}'",
                        f"command line, {dotted}",
                    )
                )
                return

    def finish(self) -> None:
        """Raises one UserError with every fault found so far, if there is any."""
        if self.faults:
            raise UserError.of(self.faults)


def chosen_by(key: str, table: Table, default: str | None = None) -> dict[str, Any]:
    """Field metadata: the options class is `table`'s entry for the value of `key` inside the field."""
    return {"choose": (key, table, default)}


def presets_in(folder: Path) -> dict[str, Any]:
    """Field metadata: the field names a YAML in `folder`, whose values stand wherever none are given.

    Once read, the options hold the values and no longer the name, so that they mean the same wherever they
    are written down.
    """
    return {"presets": folder}


def parse(cls: type, source: Source) -> Any:
    """An instance of the dataclass `cls` from a YAML file. Raises UserError with every fault at once."""
    value = build(cls, source.tree, (), source)
    source.finish()
    return value


def parse_named(cls: type, kind: str, folder: Path, name: str, field: str = "name") -> Any:
    """The `kind` that `folder`/`name`.yaml describes, a dataclass `cls` whose own `field` says the same name.

    Raises UserError that lists the known ones.
    """
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise UserError(f"unknown {kind} '{name}'", mend=nearest(name, known))
    source = Source(folder / f"{name}.yaml")
    made = parse(cls, source)
    if getattr(made, field) != name:
        raise UserError(
            f"it calls itself '{getattr(made, field)}', but its file is named {name}.yaml",
            where=source.where((field,)),
            mend="Give both the same name.",
        )
    return made


def build(cls: type, tree: Any, key: Path_, source: Source) -> Any:
    """An instance of the dataclass `cls`, or None where `source` gathered a fault.

    A class may define `check(fault)`, called with a `Report`. Where some fields are faulty already, their
    defaults or an `_Unknown` stand in for them, and what `check` says of them or of the whole is not passed
    on: it may be a consequence only.
    """
    if not isinstance(tree, dict):
        source.fault(key, f"expected a mapping, found {_describe(tree)}")
        return None
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    before = len(source.faults)
    for name, field in fields.items():
        if "presets" in field.metadata and tree.get(name) is not None:
            tree = _with_preset(field.metadata["presets"], name, tree, fields, key, source)
    for name in tree:
        if name not in fields:
            source.fault((*key, name), f"unknown key '{name}'", nearest(name, list(fields)))
    values: dict[str, Any] = {}
    faulty: set[str] = set()
    unknown: dict[str, Any] = {}  # what is faulty and has no default
    for name, field in fields.items():
        inner = (*key, name)
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        so_far = len(source.faults)
        if name not in tree:
            if needed:
                source.fault(key, f"'{name}' is missing")
        elif "choose" in field.metadata:
            values[name] = _build_chosen(field.metadata["choose"], tree[name], inner, source)
        else:
            values[name] = _convert(hints[name], tree[name], inner, source)
        if len(source.faults) > so_far:
            faulty.add(name)
            values.pop(name, None)
            if needed:
                unknown[name] = _Unknown()
    made = cls(**values, **unknown)

    def report(field: str, what: str, mend: str = "", absent: bool = False) -> None:
        place = (*key, *field.split(".")) if field else key
        if absent and source.absent is not None:
            source.absent.append(Fault(what, source.where(place), mend))
        elif not faulty or (field and field.split(".")[0] not in faulty):
            source.fault(place, what, mend)

    check: Callable[[Report], None] | None = getattr(made, "check", None)
    if check is not None:
        try:
            check(report)
        except Exception:
            if not unknown:  # otherwise it went on to what cannot be told without the field
                raise
    return made if len(source.faults) == before else None


def argument_faults(make: Any, given: dict[str, Any], leading: int, where: str) -> list[Fault]:
    """The faults of a user's values for the keyword arguments of a class, by the annotations of __init__.

    leading: so many of its arguments are not the user's to give.
    """
    signature = inspect.signature(make)
    known = list(signature.parameters)[leading:]
    hints = typing.get_type_hints(make.__init__)
    source = Source.parsed(Path(where), given)
    for name, value in given.items():
        if name not in known:
            mend = nearest(name, known) if known else "It has no options."
            source.fault((name,), f"unknown option '{name}'", mend)
        elif name in hints:
            _convert(hints[name], value, (name,), source)
    for name in known:
        if name not in given and signature.parameters[name].default is inspect.Parameter.empty:
            source.fault((), f"the option '{name}' is missing")
    return [Fault(fault.what, fault.where.replace(", ", "."), fault.mend) for fault in source.faults]


def _with_preset(
    folder: Path, name: str, tree: dict[str, Any], fields: dict[str, Any], key: Path_, source: Source
) -> dict[str, Any]:
    """`tree` laid over the preset that its entry `name` names; a block of another kind replaces its own."""
    own = {inner: value for inner, value in tree.items() if inner != name}
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if tree[name] not in known:
        source.fault((*key, name), f"unknown {name} '{tree[name]}'", nearest(str(tree[name]), known))
        return own
    preset = Source(folder / f"{tree[name]}.yaml").tree
    for inner, value in own.items():
        if "choose" in getattr(fields.get(inner), "metadata", ()) and isinstance(value, dict):
            by = fields[inner].metadata["choose"][0]
            kind = preset.get(inner, {}).get(by)
            if value.get(by, kind) != kind:
                del preset[inner]
    return typing.cast(dict[str, Any], _overlay(preset, own))


def _overlay(under: Any, over: Any) -> Any:
    if not isinstance(under, dict) or not isinstance(over, dict):
        return over
    return {**under, **{name: _overlay(under.get(name), value) for name, value in over.items()}}


class _Unknown:
    """The value of a field that is missing: too small, too large or wrong it is not."""

    def __bool__(self) -> bool:
        return False

    def __contains__(self, item: object) -> bool:
        return True

    def _compare(self, other: object) -> bool:
        return False

    __lt__ = __le__ = __gt__ = __ge__ = _compare

    def _calculate(self, other: object) -> _Unknown:
        return self

    __mod__ = __rmod__ = __add__ = __radd__ = __mul__ = __rmul__ = _calculate


def _build_chosen(choose: tuple[str, Table, str | None], tree: Any, key: Path_, source: Source) -> Any:
    by, table, default = choose
    if not isinstance(tree, dict):
        source.fault(key, f"expected a mapping, found {_describe(tree)}")
        return None
    name = tree.get(by, default)
    if name is None:
        source.fault(key, f"'{by}' is missing", f"Known: {', '.join(table.names())}.")
        return None
    if name not in table.names():
        source.fault((*key, by), f"unknown {table.kind} '{name}'", nearest(str(name), table.names()))
        return None
    return build(table.load(name), tree, key, source)


def _convert(hint: Any, value: Any, key: Path_, source: Source) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        members = typing.get_args(hint)
        if value is None and type(None) in members:
            return None
        for member in members:
            if member is not type(None) and _fits(member, value):
                return _convert(member, value, key, source)
        source.fault(key, f"expected {_name(hint)}, found {_describe(value)}")
        return None
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, key, source)
    if origin is list:
        if not isinstance(value, list):
            source.fault(key, f"expected a list, found {_describe(value)}")
            return None
        (item,) = typing.get_args(hint)
        return [_convert(item, entry, (*key, str(i)), source) for i, entry in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            source.fault(key, f"expected a mapping, found {_describe(value)}")
            return None
        item = typing.get_args(hint)[1]
        return {name: _convert(item, entry, (*key, name), source) for name, entry in value.items()}
    if not _fits(hint, value):
        mend = ""
        if origin is Literal and isinstance(value, str):
            mend = nearest(value, list(typing.get_args(hint)))
        elif hint in (int, float) and isinstance(value, str) and _is_number(value):
            mend = "Write it without quotes."
        elif hint is str and value is not None and not isinstance(value, (dict, list)):
            mend = "Put it in quotes if it is meant as text."
        source.fault(key, f"expected {_name(hint)}, found {_describe(value)}", mend)
        return None
    if isinstance(value, str) and "\0" in value:
        source.fault(key, f"there is a NUL byte in {value!r}", "Take it out.")
        return None
    if hint is float:
        return float(value)
    return Path(value) if hint is Path else value


def _fits(hint: Any, value: Any) -> bool:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint) or origin is dict:
        return isinstance(value, dict)
    if origin is list:
        return isinstance(value, list)
    if origin is Literal:
        return value in typing.get_args(hint)
    if hint is float:
        # Larger whole numbers than the largest float are no numbers either: float() would raise.
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        return numeric and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is Path:
        return isinstance(value, str) and bool(value)
    return isinstance(value, hint)


def _name(hint: Any) -> str:
    names = {
        int: "a whole number",
        float: "a finite number",
        str: "text",
        bool: "true or false",
        Path: "a path",
    }
    origin = typing.get_origin(hint)
    if hint in names:
        return names[hint]
    if origin is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if origin in (Union, types.UnionType):
        return " or ".join(_name(member) for member in typing.get_args(hint) if member is not type(None))
    if origin is list:
        return "a list"
    return "a mapping"


def _describe(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return repr(value) if isinstance(value, (str, bool, int, float)) else str(value)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _number_or_text(value: str) -> str | float:
    try:
        number = float(value)
    except ValueError:
        return value
    looks_numeric = value.strip().lower().lstrip("+-.")[:1].isdigit()
    return number if looks_numeric and "e" in value.lower() else value


def to_dict(value: Any) -> Any:
    """A dataclass as plain dicts and lists, ready for YAML or JSON; what is None is left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        entries = {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {name: entry for name, entry in entries.items() if entry is not None}
    if isinstance(value, dict):
        return {name: to_dict(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def leaves(tree: Any, key: str = "") -> dict[str, Any]:
    """The plain values of a tree of dicts and lists, by dotted key: `data.0.card`."""
    if not isinstance(tree, (dict, list)) or not tree:
        return {key: tree}
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {
        name: leaf
        for inner, value in entries
        for name, leaf in leaves(value, f"{key}.{inner}" if key else str(inner)).items()
    }
