"""Which weights get how many bits: the choice with the least loss within a bound on bytes, as an ordinary recipe.

A group is what has to be stored alike: queries, keys and values, which are joined into one product, as gate and up are;
and a tied table with its head. Its loss under every choice is measured on the model (`exaone_export.planning`), and
losses of groups are taken to add up. The least sum within a bound is a knapsack: groups begin with their smallest
choice and are raised along their convex hulls, the largest gain for a byte first. That is what Lagrange multipliers
give; what is left of the bound is then spent on whatever single change gains most.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from model.bundle import DECODER, MTP, VISION_ENCODER
from model.config import ExaoneConfig
from quantize.join import GROUPS
from quantize.recipe import Recipe, Rule, fitting_scheme
from quantize.scheme import Scheme
from quantize.sizes import part_bytes

# From the smallest to the largest.
CHOICES = (
    Scheme(4, 128, symmetric=False, method="search"),
    Scheme(4, 64, symmetric=False, method="search"),
    Scheme(4, 32, symmetric=False, method="search"),
    Scheme(8, 64, symmetric=True, method="rtn"),
)
# What is not planned: a draft head changes no answer; vision towers lose far more to 4 bits than they are large.
_FIXED = (
    Rule(f"{VISION_ENCODER}.patch_embed.*", None),
    Rule(f"{VISION_ENCODER}.*", Scheme(8, 32, symmetric=True, method="rtn")),
    Rule(f"{MTP}.layers.*", CHOICES[0]),
    Rule(f"{MTP}.fc", CHOICES[0]),
)
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Weights that are stored alike.

    Attributes:
        kind: what it is in every layer, e.g. ``mlp.gate_up_proj``; ``lm_head``, ``embed_tokens``.
        patterns: of the recipe's rules for it.
        paths: of its modules, e.g. ``decoder.layers.3.mlp.gate_proj``; those that share one tensor are one.
        layer: number of its decoder layer; None for tables and heads.
    """

    kind: str
    patterns: tuple[str, ...]
    paths: tuple[str, ...]
    layer: int | None = None

    @property
    def name(self) -> str:
        """For people."""
        return self.kind if self.layer is None else f"layers.{self.layer}.{self.kind}"


@dataclass(frozen=True)
class Option:
    """A group stored in one way.

    Attributes:
        scheme: as the recipe's rule says it.
        bytes: of its parts.
        loss: what it adds to the mean KL divergence, nats.
    """

    scheme: Scheme
    bytes: int
    loss: float


def find_groups(config: ExaoneConfig, paths: Iterable[str]) -> list[Group]:
    """What is planned of a model that generates.

    Args:
        config: of the model.
        paths: of all its modules with a weight.
    """
    known = set(paths)
    groups = []
    members = {member: joined for joined, parts in GROUPS.items() for member in parts}
    for layer in range(config.text.num_layers):
        prefix = f"{DECODER}.layers.{layer}."
        own = [path.removeprefix(prefix) for path in sorted(known) if path.startswith(prefix)]
        kinds: dict[str, list[str]] = {}
        for module in own:
            if module.endswith("_proj"):
                kinds.setdefault(members.get(module, module), []).append(module)
        for kind, modules in kinds.items():
            paths_of = tuple(f"{prefix}{module}" for module in modules)
            groups.append(Group(kind, paths_of, paths_of, layer))
    table = next(path for path in sorted(known) if path.endswith(".embed_tokens"))
    if config.text.tie_word_embeddings:
        return [*groups, Group("embed_tokens and lm_head", ("*.embed_tokens", "*.lm_head"), (table,))]
    head = Group("lm_head", ("*.lm_head",), (f"{DECODER}.lm_head",))
    return [*groups, head, Group("embed_tokens", ("*.embed_tokens",), (table,))]


def possible(group: Group, shapes: Mapping[str, Shape], float_bytes: int) -> list[tuple[Scheme, int]]:
    """Schemes that differ for a group, each with the bytes of all parts, the smallest first.

    Args:
        group: of weights.
        shapes: module path → shape of its weight.
        float_bytes: size of a float, scales included.
    """
    found: dict[tuple[Scheme | None, ...], tuple[Scheme, int]] = {}
    for scheme in CHOICES:
        fitting = tuple(_fitting(scheme, path, shapes[path]) for path in group.paths)
        sizes = (
            sum(part_bytes(shapes[path], one, float_bytes).values())
            for path, one in zip(group.paths, fitting, strict=True)
        )
        found.setdefault(fitting, (scheme, sum(sizes)))
    return sorted(found.values(), key=lambda item: item[1])


def _fitting(scheme: Scheme, path: str, shape: Shape) -> Scheme | None:
    return fitting_scheme(scheme, math.prod(shape[1:]), table=path.endswith(".embed_tokens"))


def choose(options: Sequence[Sequence[Option]], budget: int) -> list[Option] | None:
    """One option of every group, with the least sum of losses that is found within a budget of bytes.

    Args:
        options: of every group, the smallest first.
        budget: bytes of all together.

    Returns:
        The options; None where even the smallest are too large.
    """
    hulls = [_hull(group) for group in options]
    taken = [0] * len(hulls)
    left = budget - sum(hull[0].bytes for hull in hulls)
    if left < 0:
        return None
    # Steps of a hull gain less and less for a byte, so that the best next step of any group is the best of all.
    steps = [(-_gain(hull[0], hull[1]), i) for i, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, i = heapq.heappop(steps)
        hull, at = hulls[i], taken[i]
        price = hull[at + 1].bytes - hull[at].bytes
        if price > left:
            continue  # what comes behind it on the hull costs more still
        left, taken[i] = left - price, at + 1
        if at + 2 < len(hull):
            heapq.heappush(steps, (-_gain(hull[at + 1], hull[at + 2]), i))
    chosen = [hull[at] for hull, at in zip(hulls, taken, strict=True)]
    return _fill(options, chosen, left)


def _gain(smaller: Option, larger: Option) -> float:
    """Loss saved for a byte."""
    return (smaller.loss - larger.loss) / (larger.bytes - smaller.bytes)


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of loss over bytes, the smallest first; losses fall along it."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bytes, option.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _fill(options: Sequence[Sequence[Option]], chosen: list[Option], left: int) -> list[Option]:
    """Spends what is left on single changes, the one that saves most first."""
    while True:
        best: tuple[float, int, Option] | None = None
        for i, group in enumerate(options):
            for option in group:
                saved = chosen[i].loss - option.loss
                if option.bytes - chosen[i].bytes <= left and saved > (0 if best is None else best[0]):
                    best = (saved, i, option)
        if best is None:
            return chosen
        _, i, option = best
        left -= option.bytes - chosen[i].bytes
        chosen[i] = option


def plan_recipe(name: str, groups: Sequence[Group], chosen: Sequence[Option]) -> Recipe:
    """The choice as a recipe: what most weights of a kind get is one rule; layers that differ have their own."""
    exceptions, common = [], []
    kinds = dict.fromkeys(group.kind for group in groups if group.layer is not None)
    for kind in kinds:
        members = [(g, option.scheme) for g, option in zip(groups, chosen, strict=True) if g.kind == kind]
        schemes = [scheme for _, scheme in members]
        usual = max(dict.fromkeys(schemes), key=schemes.count)
        exceptions += [Rule(path, scheme) for group, scheme in members if scheme != usual for path in group.patterns]
        common += [Rule(f"{DECODER}.layers.*.{module}", usual) for module in GROUPS.get(kind, (kind,))]
    tables = [
        Rule(pattern, option.scheme)
        for group, option in zip(groups, chosen, strict=True)
        if group.layer is None
        for pattern in group.patterns
    ]
    return Recipe(name, (*_FIXED, *tables, *exceptions, *common))


def comments(recipe: Recipe, lines: Iterable[str]) -> str:
    """A recipe's file with lines of comment above it."""
    return "".join(f"# {line}\n" for line in lines) + "\n" + recipe.to_toml()
