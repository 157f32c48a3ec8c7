"""How settings are declared, and how they are read from the environment of a process."""

import dataclasses
import difflib
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from cerberus import errors

PACKAGE = pathlib.Path(__file__).parent
ROOT = PACKAGE.parent
REQUIRED = "required"
_PREFIX = "CERBERUS_"
# Kubernetes and Docker set these in every container if a service is called cerberus.
_OF_PLATFORM = re.compile(
    r"CERBERUS_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?|NAME|ENV_\w+)"
)
# `float` also accepts digits of other scripts, and underscores.
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_BEGIN, _END = "<!-- settings: `make docs` writes them -->", "<!-- end of settings -->"
_VARIABLES = "variables"
_READ = "read"

Read = Callable[[str, str], Any]
"""Takes the name of a variable and its text; raises ConfigError for a text that it cannot take."""
Group = TypeVar("Group")


def shipped(name: str, package: pathlib.Path = PACKAGE) -> pathlib.Path:
    """Return a directory that comes with the package: inside it as installed, else beside it."""
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable of the environment.

    Attributes:
        name: Its name in the environment.
        default: As text; `REQUIRED` where there is none.
        meaning: One phrase of Markdown, with the unit.
    """

    name: str
    default: str
    meaning: str


def text(name: str, told: str) -> str:
    """Read any text."""
    return told


def words(name: str, told: str) -> tuple[str, ...]:
    """Read words that commas separate."""
    return tuple(word for part in told.split(",") if (word := part.strip()))


def some_of(*known: str) -> Read:
    """Make a reader of a comma-separated list of some of these words, at least one."""

    def read(name: str, told: str) -> frozenset[str]:
        named = frozenset(words(name, told))
        if not named or named - set(known):
            raise errors.ConfigError(f"{name} must name some of {', '.join(known)}")
        return named

    return read


def file(name: str, told: str) -> pathlib.Path:
    """Read the path of a file."""
    return pathlib.Path(told)


def matching(pattern: str, meaning: str) -> Read:
    """Make a reader of text that a pattern matches as a whole; `meaning` describes such text."""

    def read(name: str, told: str) -> str:
        if not re.fullmatch(pattern, told):
            raise errors.ConfigError(f"{name} must be {meaning}, not {told!r}")
        return told

    return read


def choice(*known: str) -> Read:
    """Make a reader of one of these texts."""
    named = [each for each in known if each]
    return matching("|".join(known), f"{', '.join(named[:-1])} or {named[-1]}")


def flag(name: str, told: str) -> bool:
    """Read 1 as true and 0 as false."""
    return bool(matching("[01]", "0 or 1")(name, told) == "1")


def number(low: float, high: float) -> Read:
    """Make a reader of numbers from `low` to `high`."""

    def read(name: str, told: str) -> float:
        value = float(told) if _NUMBER.fullmatch(told) else float("nan")
        if not low <= value <= high:
            raise errors.ConfigError(
                f"{name} must be a number from {low:g} to {high:g}, not {told!r}"
            )
        return value

    return read


def integer(low: int, high: int) -> Read:
    """Make a reader of whole numbers from `low` to `high`."""
    any_number = number(low, high)

    def read(name: str, told: str) -> int:
        value = any_number(name, told)
        if value != int(value):
            raise errors.ConfigError(f"{name} must be a whole number, not {told!r}")
        return int(value)

    return read


def ms(low: float, high: float, *, unit_s: int = 1) -> Read:
    """Make a reader of ms from a number of units of `unit_s` seconds, from `low` to `high`."""
    units = number(low, high)
    return lambda name, told: round(units(name, told) * unit_s * 1000)


def variable(name: str, default: str, read: Read, meaning: str, *, secret: bool = False) -> Any:
    """Declare a field of a group of settings that one variable sets.

    Args:
        name: Of the variable.
        default: As text; `REQUIRED` where there is none.
        read: Makes the value from the variable's text, without spaces around it.
        meaning: One phrase of Markdown, with the unit.
        secret: Whether `repr` leaves the field out.
    """
    return first_of(Variable(name, default, meaning), read=read, secret=secret)


def first_of(*variables: Variable, read: Read, secret: bool = False) -> Any:
    """Declare a field that takes the first of these variables that is not empty."""
    declared = {_VARIABLES: variables, _READ: read}
    if REQUIRED in (v.default for v in variables):
        return dataclasses.field(metadata=declared, repr=not secret)
    return dataclasses.field(
        default_factory=lambda: _value(variables, read, {}), metadata=declared, repr=not secret
    )


def read(group: type[Group], environ: Mapping[str, str]) -> Group:
    """Read a group of settings, and the groups in it; an empty variable counts as not set.

    Raises:
        ConfigError: A variable is missing or wrong; the message names it.
    """
    values = {}
    for field in dataclasses.fields(group):  # type: ignore[arg-type]
        if variables := field.metadata.get(_VARIABLES):
            values[field.name] = _value(variables, field.metadata[_READ], environ)
        else:
            values[field.name] = read(_group(field), environ)
    return group(**values)


def _value(variables: tuple[Variable, ...], read: Read, environ: Mapping[str, str]) -> Any:
    for each in variables:
        if told := environ.get(each.name, "").strip():
            return read(each.name, told)
    unset = next((v for v in variables if v.default == REQUIRED), variables[0])
    return read(unset.name, "" if unset.default == REQUIRED else unset.default)


def groups(group: type[Any]) -> Iterator[type[Any]]:
    """Yield a group of settings, and the groups in it."""
    yield group
    for field in dataclasses.fields(group):
        if _VARIABLES not in field.metadata:
            yield from groups(_group(field))


def _group(field: dataclasses.Field[Any]) -> type[Any]:
    if not isinstance(field.type, type):
        raise TypeError(f"{field.name} is declared with neither a variable nor a group")
    return field.type


def own(group: type[Any]) -> Iterator[Variable]:
    """Yield the variables of a group, without those of the groups in it."""
    for field in dataclasses.fields(group):
        yield from field.metadata.get(_VARIABLES, ())


def declared(group: type[Any]) -> Iterator[Variable]:
    """Yield the variables of a group, and of the groups in it."""
    for each in groups(group):
        yield from own(each)


def check_names(environ: Mapping[str, str], known: Collection[str]) -> None:
    """Refuse an unknown variable that has our prefix.

    Raises:
        ConfigError: There is one; the message names the most similar setting.
    """
    ours = {name.removeprefix(_PREFIX): name for name in known if name.startswith(_PREFIX)}
    for name in sorted(environ):
        if not name.startswith(_PREFIX) or not environ[name].strip():
            continue
        if name in known or _OF_PLATFORM.fullmatch(name):
            continue
        like = difflib.get_close_matches(name.removeprefix(_PREFIX), ours, n=1)
        raise errors.ConfigError(
            f"{name} is not a setting; "
            + (f"did you mean {ours[like[0]]}?" if like else "`cerberus settings` lists them all")
        )


def between_markers(page: str, told: str) -> str:
    """Put Markdown between the two markers of a page.

    Raises:
        ConfigError: The page lacks one of them.
    """
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not end:
        raise errors.ConfigError(f"the page lacks the line {_BEGIN} or {_END}")
    return f"{before}{begin}\n\n{told}\n{end}{after}"


def tables(group: type[Any], root: pathlib.Path) -> str:
    """Return the variables of a group in Markdown, a table for each group in it.

    Args:
        group: Of settings; its docstring is the title.
        root: Removed from defaults that are paths.
    """
    told: list[str] = []
    for each in groups(group):
        told += ["", f"## {each.__doc__}".rstrip("."), ""]
        told += ["| variable | default | meaning |", "|---|---|---|"]
        for one in own(each):
            shown = one.default.replace(f"{root}/", "")
            shown = shown if shown in ("", REQUIRED) else f"`{shown}`"
            told.append(f"| `{one.name}` | {shown} | {one.meaning} |")
    return "\n".join(told[1:]) + "\n"
