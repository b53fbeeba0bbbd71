"""YAML with the meaning of version 1.2, its core schema, to and from plain Python values.

    true, false            are the only booleans; yes, no, on and off are text
    8, 012, 0o14, 0x0c     are whole numbers, 012 is twelve
    0.001, 1e-3, .5, .inf  are numbers; 1_000, 12:30 and 2026-01-01 are text

PyYAML reads version 1.1, in which 012 is ten, 12:30 is 750, `no` is false and 1e-3 is text. Here it only parses. A key that
is given twice in one mapping is refused, as one of the two values would be lost. So is a text that a few lines of aliases
make endless, or larger and deeper than any configuration.
"""

import re
from typing import Any, ClassVar, NoReturn

import yaml

TAG = "tag:yaml.org,2002:"
MERGE = TAG + "merge"
MAX_DEPTH = 100  # of lists and mappings in one another: reading, copying and writing them is recursive
MAX_VALUES = 100_000  # with those that an alias repeats
MAX_DIGITS = 1000  # of a whole number: Python prints no more than 4300
NULL = re.compile(r"(?:~|null|Null|NULL|)")
BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)")
INT = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)")
FLOAT = re.compile(r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))")
# What a plain scalar is: the first of these that matches it whole, and its possible first letters.
SCALARS = (
    (TAG + "null", NULL, ["~", "n", "N", ""]),
    (TAG + "bool", BOOL, list("tTfF")),
    (TAG + "int", INT, list("-+0123456789")),
    (TAG + "float", FLOAT, list("-+.0123456789")),
    (MERGE, re.compile("<<"), ["<"]),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}
    yaml_constructors: ClassVar[dict] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0  # lists and mappings around the node that is being read
        self._sizes: dict[yaml.Node, tuple[int, int]] = {}  # of each whole node the values in it, and their depth

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Looked at here, where an alias is still one, and before what is too deep is read."""
        event = self.peek_event()
        if self._depth > MAX_DEPTH:
            raise _error(f"lists and mappings in one another more than {MAX_DEPTH} deep; flatten them", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        assert node is not None
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent) and node not in self._sizes:
            raise _error(f"the alias *{event.anchor} stands inside of what it names, which has no end; write it out", event)
        inner = [self._sizes[one] for one in _parts(node)]
        values, depth = 1 + sum(size for size, _ in inner), 1 + max((depth for _, depth in inner), default=0)
        if values > MAX_VALUES or depth > MAX_DEPTH:
            raise _error(f"aliases make it more than {MAX_VALUES} values or {MAX_DEPTH} deep; use fewer", event)
        self._sizes[node] = values, depth
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Looked at here, because what `<<` merges in later may be given again."""
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error("a key is a name or a number, not a list or a mapping", key)
            name, line = key.value if key.tag == MERGE else self.construct_object(key), key.start_mark.line + 1
            if name in lines:
                where = f"in lines {lines[name]} and {line}" if lines[name] != line else f"twice in line {line}"
                raise _error(f"the key {key.value!r} stands {where}: keep one of them", key)
            lines[name] = line
        return node

    def construct_bool(self, node: yaml.ScalarNode) -> bool:
        return _written(node, BOOL).lower() == "true"

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = _written(node, INT)
        if len(text) > MAX_DIGITS:
            raise _error(f"a whole number of more than {MAX_DIGITS} digits; write a smaller one, or a text in quotes", node)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def construct_float(self, node: yaml.ScalarNode) -> float:
        return float(_written(node, FLOAT).lower().replace(".inf", "inf").replace(".nan", "nan"))

    def construct_unknown(self, node: yaml.Node) -> NoReturn:
        raise _error(f"{node.tag.replace(TAG, '!!')} is no type of YAML's core schema", node)


def _parts(node: yaml.Node) -> list[yaml.Node]:
    """The nodes directly in a list or a mapping."""
    if isinstance(node, yaml.MappingNode):
        return [one for pair in node.value for one in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _written(node: yaml.ScalarNode, form: re.Pattern[str]) -> str:
    """A scalar's text, which an explicit tag, say `!!int 1_000`, may have given a type that it does not have."""
    if not isinstance(node, yaml.ScalarNode):
        raise _error(f"a {node.id} is no {node.tag.removeprefix(TAG)}", node)
    if not form.fullmatch(node.value):
        raise _error(f"{node.value!r} is no {node.tag.removeprefix(TAG)}", node)
    return node.value


def _error(problem: str, place: Any) -> yaml.MarkedYAMLError:
    """place: a node or an event, which says in which line it begins."""
    return yaml.constructor.ConstructorError(None, None, problem, place.start_mark)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version would not read as text."""


for _tag, _form, _first in SCALARS:
    _whole = re.compile(_form.pattern + r"\Z")
    _Loader.add_implicit_resolver(_tag, _whole, _first)
    _Dumper.add_implicit_resolver(_tag, _whole, _first)
for _kind in ("null", "str", "seq", "map"):
    _Loader.add_constructor(TAG + _kind, yaml.SafeLoader.yaml_constructors[TAG + _kind])
_Loader.add_constructor(TAG + "bool", _Loader.construct_bool)
_Loader.add_constructor(TAG + "int", _Loader.construct_int)
_Loader.add_constructor(TAG + "float", _Loader.construct_float)
_Loader.add_constructor(None, _Loader.construct_unknown)


def load(text: str) -> Any:
    """The values in a text. Raises ValueError with the line for what is not valid, and for a key that is given twice."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}{error.problem or error.context}") from None
    except yaml.YAMLError as error:  # a character that no YAML may hold
        raise ValueError(" ".join(str(error).split())) from None


def dump(data: Any) -> str:
    """Text that `load` reads as the same values, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False)
