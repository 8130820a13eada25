from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import UsageError
from quantize.methods import METHODS
from quantize.recipe import SHIPPED, Recipe, Rule, fitting_scheme, load_recipe, parse_recipe
from quantize.scheme import BITS, BLOCK_SIZES, Scheme

SCHEMES = st.builds(
    Scheme, st.sampled_from(BITS), st.sampled_from(BLOCK_SIZES), st.booleans(), st.sampled_from(sorted(METHODS))
)
# Text files end lines in their own way; names and patterns are one line.
LINES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: bool(text.strip()))
RECIPES = st.builds(
    Recipe, LINES, st.lists(st.builds(Rule, LINES, st.none() | SCHEMES), min_size=1, max_size=5).map(tuple)
)


def rule(text: str) -> Recipe:
    return parse_recipe(f'name = "mine"\n[[rule]]\nmatch = "*"\n{text}\n', "mine.toml")


@pytest.mark.parametrize(
    ("path", "int8", "int4"),
    [
        ("decoder.layers.3.mlp.down_proj", 8, 4),
        ("decoder.layers.0.self_attn.q_proj", 8, 4),
        ("decoder.lm_head", 8, 4),
        ("decoder.embed_tokens", 8, 4),
        ("embedding.embed_tokens", 8, 4),
        ("mtp.fc", 8, 4),
        ("mtp.lm_head", 8, 4),
        ("vision_encoder.patch_embed.proj", None, None),
        ("vision_encoder.blocks.0.attn.qkv", 8, 8),
        ("vision_encoder.merger.mlp.0", 8, 8),
    ],
)
def test_shipped_recipes(path: str, int8: int | None, int4: int | None) -> None:
    for name, bits in (("int8", int8), ("int4", int4), ("int4-edge", int4)):
        recipe = load_recipe(name)
        assert recipe.name == name
        matched = recipe.match(path)
        assert matched is not None
        assert (matched.scheme.bits if matched.scheme else None) == bits


def test_the_first_rule_that_matches_wins_and_a_star_crosses_dots(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text(
        'name = "my-int4"\n'
        '[[rule]]\nmatch = "decoder.layers.*.mlp.down_proj"\n'
        'bits = 8\nblock_size = 64\nsymmetric = false\nmethod = "rtn"\n'
        '[[rule]]\nmatch = "decoder.layers.[01].*"\nbits = "float"\n'
        '[[rule]]\nmatch = "decoder.*"\nbits = 4\n'
    )
    recipe = load_recipe(file)
    assert recipe.match("decoder.layers.0.mlp.down_proj") == Rule(
        "decoder.layers.*.mlp.down_proj", Scheme(8, 64, False, "rtn")
    )
    assert recipe.match("decoder.layers.1.mlp.up_proj") == Rule("decoder.layers.[01].*", None)
    assert recipe.match("decoder.layers.7.mlp.up_proj") == Rule("decoder.*", Scheme(4, 32, True, "rtn"))
    assert recipe.match("Decoder.lm_head") is None
    assert recipe.match("vision_encoder.merger.mlp.0") is None
    assert parse_recipe(recipe.to_toml(), "again") == recipe


@given(RECIPES)
def test_toml_round_trip(recipe: Recipe) -> None:
    assert parse_recipe(recipe.to_toml(), "again") == recipe


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    assert parse_recipe(recipe.to_toml(), "again") == recipe


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_store_a_tied_table_once(name: str) -> None:
    recipe = load_recipe(name)
    rules = [recipe.match(f"decoder.{module}") for module in ("embed_tokens", "lm_head")]
    table, head = (fitting_scheme(rule.scheme, 2048) if rule and rule.scheme else None for rule in rules)
    assert table is not None
    assert table == head


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("bits = 4\ngroup_size = 32", "rule 1: unknown key 'group_size'"),
        ("", 'bits is missing, wanted one of 4, 8, "float"'),
        ("bits = 3", 'bits is 3, wanted one of 4, 8, "float"'),
        ("bits = 4.0", "bits is 4.0"),
        ("bits = true", "bits is True"),
        ('bits = "int4"', "bits is 'int4'"),
        ("bits = 4\nblock_size = 8", "block_size is 8, wanted one of 16, 32, 64, 128, 256"),
        ("bits = 4\nblock_size = 48", "block_size is 48"),
        ("bits = 4\nblock_size = 512", "block_size is 512"),
        ('bits = 4\nblock_size = "32"', "block_size is '32'"),
        ("bits = 4\nsymmetric = 1", "symmetric is 1, wanted one of true, false"),
        ('bits = 4\nmethod = "magic"', "method is 'magic', wanted one of"),
        ("bits = 4\nmethod = 7", "method is 7"),
        ('bits = "float"\nblock_size = 32', "block_size has no meaning"),
    ],
)
def test_refuses_a_rule(text: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        rule(text)
    assert why in str(caught.value)
    assert "mine.toml, rule 1" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("name = ", "not TOML"),
        ('[[rule]]\nmatch = "*"\nbits = 4', "name is None"),
        ('name = ""\n[[rule]]\nmatch = "*"\nbits = 4', "name is ''"),
        ('name = "x"', "no [[rule]] tables"),
        ('name = "x"\nrule = []', "no [[rule]] tables"),
        ('name = "x"\nrule = [1]', "no [[rule]] tables"),
        ('name = "x"\n[rule]\nmatch = "*"\nbits = 4', "no [[rule]] tables"),
        ('name = "x"\nrules = 1', "unknown key 'rules'"),
        ('name = "x"\n[[rule]]\nbits = 4', "match is missing"),
        ('name = "x"\n[[rule]]\nmatch = ["a"]\nbits = 4', "match is ['a']"),
        ('name = "x"\n[[rule]]\nmatch = "a"\nbits = 4\n[[rule]]\nmatch = "b"\nbit = 4', "rule 2: unknown key 'bit'"),
        ("a = " + "[" * 5000, "not TOML"),
    ],
)
def test_refuses_a_file(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_recipe(file)
    assert why in str(caught.value)
    assert "bad.toml" in str(caught.value)


def test_refuses_what_is_no_recipe_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no recipe of this name"):
        load_recipe("int5")
    with pytest.raises(UsageError, match="no such file"):
        load_recipe(tmp_path)
    binary = tmp_path / "model.onnx"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        load_recipe(binary)
    binary.write_bytes(b" " * (1 << 21))
    with pytest.raises(UsageError, match="larger than"):
        load_recipe(binary)


@pytest.mark.parametrize(
    ("columns", "block_size", "fits"),
    [(5120, 32, 32), (216, 32, None), (48, 32, 16), (96, 64, 32), (96, 256, 32), (1176, 256, None), (256, 16, 16)],
)
def test_takes_the_largest_block_that_divides(columns: int, block_size: int, fits: int | None) -> None:
    scheme = fitting_scheme(Scheme(4, block_size), columns)
    assert (scheme.block_size if scheme else None) == fits


RULE = 'name = "n"\n[[rule]]\nmatch = "*"\nbits = 8\n'


def test_limits_for_verify_are_read_and_written() -> None:
    recipe = parse_recipe(RULE + "[verify]\nmean_kld = 0.05\nsame_top = 1\n", "r.toml")
    assert recipe.limits == {"mean_kld": 0.05, "same_top": 1.0}
    assert parse_recipe(recipe.to_toml(), "again") == recipe
    assert parse_recipe(RULE, "r.toml").limits == {}


@pytest.mark.parametrize(
    "table",
    ["[verify]\nkld = 1", "[verify]\nmean_kld = -1", '[verify]\nmean_kld = "0.1"', "[verify]\nsame_top = 97",
     "[verify]\nmean_kld = inf", "[verify]\nmean_kld = nan", "[verify]\nmean_kld = true", "[[verify]]\nmean_kld = 1"],
)  # fmt: skip
def test_limits_that_make_no_sense_are_refused(table: str) -> None:
    with pytest.raises(UsageError):
        parse_recipe(RULE + table, "r.toml")
