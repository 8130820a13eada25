"""Recipes: which weight is stored how, as an ordered list of rules in a TOML file.

    name = "my-int4"
    [[rule]]
    match = "decoder.layers.*.mlp.down_proj"
    bits = 8                # 4 | 8 | "float"
    block_size = 32         # 16 | 32 | 64 | 128 | 256
    symmetric = true
    method = "rtn"          # "rtn" | "search" | "hqq"; with --calibration "gptq" | "awq" | "awq-gptq"
    activations = "float"   # "float" | "int8"; with "int8" also rotate = 16 | 32 | 64 | 128
    [[rule]]
    match = "decoder.*"
    bits = 4
    [verify]                # what `verify --source` must find, see `model.limits`
    mean_kld = 0.05
    [target.cuda]           # what all rules with blocks get instead where the bundle is for CUDA
    block_size = 32
    symmetric = true

The first rule that matches a module's full path wins; what no rule matches stays float. `match` is a shell
pattern over the whole path, as `fnmatch.fnmatchcase` reads it: ``*`` stands for any characters, dots included,
``?`` for one, ``[0-3]`` for one of a set; upper and lower case differ.

With `activations` "int8", products are computed in integers (see `quantize.dynamic`): bits is 8, every output has one
scale, and so there is no block size. `rotate` then spreads massive activations over as many of their neighbours (see
`quantize.rotate`); with 64 and 2,048 outputs it costs about a sixth of the product's time, and nothing on disk.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any

from model.errors import UsageError, printable
from model.limits import fault
from quantize.methods import METHODS, NEEDS, NOTHING, SCALED
from quantize.rotate import ROTATIONS
from quantize.scheme import ACTIVATIONS, BITS, BLOCK_SIZES, FLOAT, INT8, Scheme

SHIPPED = ("int8", "int4", "int4-edge", "int4-quality", "int8-dynamic")
DEFAULT = Scheme(bits=4)
_RULE_KEYS = ("match", "bits", "block_size", "symmetric", "method", "activations", "rotate")
_WHAT = "cannot use recipe"
# A recipe is a page of text; anything larger is a mistaken path.
_MAX_BYTES = 1 << 20
# What takes the place of methods that need statistics, where rows are looked up.
WITHOUT_INPUTS = "search"
# Products of so many codes, 8 bits each, fit a sum of 32 bits.
MOST_COLUMNS = 1 << 16


@dataclass(frozen=True)
class Rule:
    """Weights whose module path matches `match` get `scheme`; None keeps them float."""

    match: str
    scheme: Scheme | None

    def matches(self, path: str) -> bool:
        """Whether the rule is meant for the module at `path`, e.g. ``decoder.layers.3.mlp.down_proj``."""
        return fnmatchcase(path, self.match)


@dataclass(frozen=True)
class Recipe:
    """Rules in order of precedence, and what a bundle made with them is held to when it is verified.

    `targets` says of "cuda" what every rule with blocks gets there instead: block_size, symmetric.
    """

    name: str
    rules: tuple[Rule, ...]
    limits: Mapping[str, float] = field(default_factory=dict)
    targets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def for_target(self, target: str) -> Recipe:
        """The recipe as it is for "cpu" or "cuda"."""
        changes = self.targets.get(target, {})
        rules = tuple(
            replace(rule, scheme=replace(rule.scheme, **changes))
            if rule.scheme is not None and rule.scheme.activations != INT8
            else rule
            for rule in self.rules
        )
        return replace(self, rules=rules, targets={}) if changes else self

    def match(self, path: str) -> Rule | None:
        """The first rule that matches a module's full path; None if there is none."""
        return next((rule for rule in self.rules if rule.matches(path)), None)

    @property
    def cpu_rule(self) -> Rule | None:
        """The first rule that wants products of integers, for which only the CPU has kernels."""
        return next((rule for rule in self.rules if rule.scheme is not None and rule.scheme.activations == INT8), None)

    @property
    def calibrated_rule(self) -> Rule | None:
        """The first rule whose method has to be given statistics of the inputs."""
        schemes = ((rule, rule.scheme) for rule in self.rules)
        return next((rule for rule, scheme in schemes if scheme is not None and NEEDS[scheme.method] != NOTHING), None)

    def to_toml(self) -> str:
        """The recipe as a file that `load_recipe` reads back."""
        lines = [f"name = {_toml_string(self.name)}"]
        for rule in self.rules:
            lines += ["", "[[rule]]", f"match = {_toml_string(rule.match)}"]
            if rule.scheme is None:
                lines.append(f'bits = "{FLOAT}"')
                continue
            lines.append(f"bits = {rule.scheme.bits}")
            if rule.scheme.activations == INT8:
                lines.append(f"activations = {_toml_string(INT8)}")
                if rule.scheme.rotate:
                    lines.append(f"rotate = {rule.scheme.rotate}")
            else:
                lines.append(f"block_size = {rule.scheme.block_size}")
            lines += [
                f"symmetric = {'true' if rule.scheme.symmetric else 'false'}",
                f"method = {_toml_string(rule.scheme.method)}",
            ]
        if self.limits:
            lines += ["", "[verify]", *(f"{name} = {limit!r}" for name, limit in self.limits.items())]
        for target, changes in self.targets.items():
            lines += ["", f"[target.{target}]", *(f"{key} = {_toml_value(value)}" for key, value in changes.items())]
        return "\n".join(lines) + "\n"


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Reads a shipped recipe (one of `SHIPPED`) or a TOML file.

    Raises:
        UsageError: no such recipe, not TOML, or a key, type or value that recipes do not have.
    """
    where = str(name_or_path)
    if where in SHIPPED:
        return parse_recipe((files("quantize") / "recipes" / f"{where}.toml").read_text("utf-8"), where)
    path = Path(name_or_path)
    remedy = f"Give one of {', '.join(SHIPPED)}, or a TOML file"
    if not path.is_file():
        raise UsageError(_WHAT, where, "no recipe of this name and no such file", remedy)
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise UsageError(_WHAT, where, f"larger than {_MAX_BYTES} bytes", remedy)
        return parse_recipe(data.decode("utf-8"), where)
    except OSError as reason:
        raise UsageError(_WHAT, where, f"cannot be read ({reason.strerror})", remedy) from None
    except UnicodeDecodeError:
        raise UsageError(_WHAT, where, "not UTF-8 text", remedy) from None


def parse_recipe(text: str, where: str) -> Recipe:
    """Reads a recipe from TOML text; `where` names it in errors.

    Raises:
        UsageError: not TOML, or a key, type or value that recipes do not have.
    """
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as reason:  # beside faults of TOML, an integer of thousands of digits
        raise UsageError(_WHAT, where, f"not TOML ({printable(str(reason))})", "Correct the file") from None
    _refuse_unknown(raw, ("name", "rule", "verify", "target"), where)
    name, rules = raw.get("name"), raw.get("rule")
    if not isinstance(name, str) or not name.strip():
        raise UsageError(_WHAT, where, f"name is {printable(repr(name))}, a text is wanted", 'Add name = "..."')
    if not isinstance(rules, list) or not rules or not all(isinstance(rule, dict) for rule in rules):
        raise UsageError(_WHAT, where, "there are no [[rule]] tables", "Add at least one [[rule]]")
    parsed = tuple(_parse_rule(rule, f"{where}, rule {i}") for i, rule in enumerate(rules, start=1))
    targets = _parse_targets(raw.get("target", {}), f"{where}, target")
    return Recipe(name, parsed, _parse_limits(raw.get("verify", {}), f"{where}, verify"), targets)


def _parse_targets(raw: object, where: str) -> dict[str, dict[str, Any]]:
    if not isinstance(raw, dict) or not all(isinstance(changes, dict) for changes in raw.values()):
        raise UsageError(_WHAT, where, f"it is {str(raw)[:40]!r}, tables are wanted", "Write [target.cuda]")
    _refuse_unknown(raw, ("cuda",), where)
    allowed = {"block_size": BLOCK_SIZES, "symmetric": (True, False)}
    for changes in raw.values():
        _refuse_unknown(changes, tuple(allowed), where)
    return {
        target: {key: _one_of(changes, key, allowed[key], where) for key in changes} for target, changes in raw.items()
    }


def _parse_limits(raw: object, where: str) -> dict[str, float]:
    if not isinstance(raw, dict):
        raise UsageError(_WHAT, where, f"it is {str(raw)[:40]!r}, a table is wanted", "Write [verify]")
    for name, limit in raw.items():
        if why := fault(name, limit):
            raise UsageError(_WHAT, where, why, "Correct the table")
    return {name: float(limit) for name, limit in raw.items()}


def _parse_rule(raw: Mapping[str, Any], where: str) -> Rule:
    _refuse_unknown(raw, _RULE_KEYS, where)
    match = raw.get("match")
    if not isinstance(match, str) or not match:
        raise _wrong(where, "match", match, "a pattern over module paths")
    bits = raw.get("bits")
    if bits == FLOAT:
        extra = [key for key in raw if key not in ("match", "bits")]
        if extra:
            raise UsageError(_WHAT, where, f"{extra[0]} has no meaning where bits is {FLOAT!r}", f"Remove {extra[0]}")
        return Rule(match, None)
    if _one_of(raw, "activations", ACTIVATIONS, where) == INT8:
        return Rule(match, _integer_products(raw, where))
    if "rotate" in raw:
        why = f"rotate has no meaning where activations is not {INT8!r}"
        raise UsageError(_WHAT, where, why, "Remove rotate")
    scheme = Scheme(
        bits=_one_of(raw, "bits", (*BITS, FLOAT), where),
        block_size=_one_of(raw, "block_size", BLOCK_SIZES, where),
        symmetric=_one_of(raw, "symmetric", (True, False), where),
        method=_one_of(raw, "method", tuple(METHODS), where),
    )
    return Rule(match, scheme)


def _integer_products(raw: Mapping[str, Any], where: str) -> Scheme:
    """The scheme of a rule whose activations are int8; its block is as long as the rows it will be used for."""
    if "block_size" in raw:
        why = f"block_size has no meaning where activations is {INT8!r}: every output has one scale"
        raise UsageError(_WHAT, where, why, "Remove block_size")
    if raw.get("rotate") and raw.get("method") in SCALED:
        raise UsageError(
            _WHAT, where, "awq scales the inputs that rotate turns", "Remove rotate, or use another method"
        )
    return Scheme(
        bits=_one_of(raw, "bits", (8,), where),
        block_size=0,
        symmetric=_one_of(raw, "symmetric", (True,), where),
        method=_one_of(raw, "method", tuple(METHODS), where),
        activations=INT8,
        rotate=_one_of(raw, "rotate", (0, *ROTATIONS), where),
    )


def _one_of(raw: Mapping[str, Any], key: str, allowed: tuple[Any, ...], where: str) -> Any:
    """The value of `key`, its default if absent; bits has no default. 1 is not true, and 4.0 is not 4."""
    value = raw.get(key, None if key == "bits" else getattr(DEFAULT, key))
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise _wrong(where, key, value, "one of " + ", ".join(_toml_value(choice) for choice in allowed))
    return value


def _refuse_unknown(raw: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in raw:
        if key not in known:
            raise UsageError(_WHAT, where, f"unknown key {printable(key)!r}", f"Known keys: {', '.join(known)}")


def _wrong(where: str, key: str, value: object, wanted: str) -> UsageError:
    got = "missing" if value is None else repr(value)[:80]
    return UsageError(_WHAT, where, f"{key} is {got}, wanted {wanted}", "Correct the rule")


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return _toml_string(value) if isinstance(value, str) else str(value)


def _toml_string(text: str) -> str:
    # JSON's escapes are TOML's, but for DEL, which TOML wants escaped and JSON does not.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def fitting_scheme(scheme: Scheme, columns: int, *, table: bool = False) -> Scheme | None:
    """`scheme` for a weight: with the largest block, at most its own, that divides K; None if none does.

    A table's rows have no inputs that could be calibrated; where the method needs them, it is searched.

    Args:
        scheme: of a rule.
        columns: K.
        table: whether rows are looked up; then there are no activations, and the scheme is one of blocks.
    """
    if table and NEEDS.get(scheme.method, NOTHING) != NOTHING:
        scheme = replace(scheme, method=WITHOUT_INPUTS)
    if scheme.activations == INT8:
        if not table:
            if columns % 4 or columns > MOST_COLUMNS:
                return None
            rotate = max((size for size in ROTATIONS if size <= scheme.rotate and columns % size == 0), default=0)
            return replace(scheme, block_size=columns, rotate=rotate)
        scheme = replace(scheme, activations=FLOAT, rotate=0, block_size=DEFAULT.block_size)
    sizes = [size for size in BLOCK_SIZES if size <= scheme.block_size and columns % size == 0]
    return replace(scheme, block_size=max(sizes)) if sizes else None
