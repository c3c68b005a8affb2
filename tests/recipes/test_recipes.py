"""Every shipped recipe: parses, fits its model at full size, says what it needs; typos refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import yaml

from fissile import families
from fissile.config import Recipe
from fissile.errors import RecipeError
from fissile.recipe_files import (
    PUBLISHED,
    load_recipe,
    parse_recipe,
    published_config,
    recipe_folder,
    recipe_schema,
    shipped_recipes,
)
from fissile.run.recipe_header import MACHINES, header, published_plan, with_header

jsonschema = pytest.importorskip("jsonschema")

EVERY = shipped_recipes()
RECIPES = {name: path for name, path in EVERY.items() if (path.parent / PUBLISHED).is_file()}
FOLDERS = sorted({name.rpartition("/")[0] for name in RECIPES})
COUNTS = {
    "gemma3/1b": 999_885_952,
    "gemma3/4b": 3_880_263_168,
    "llama/3.1-8b": 8_030_261_248,
    "llama/3.2-1b": 1_235_814_400,
    "llama/3.2-3b": 3_212_749_824,
    "mistral/7b-v0.3": 7_248_023_552,
    "mixtral/8x7b": 46_702_792_704,
    "olmo2/1b": 1_484_916_736,
    "olmo2/7b": 7_298_617_344,
    "olmoe/1b-7b": 6_919_161_856,
    "phi3/4-mini": 3_836_021_760,
    "qwen2/2.5-0.5b": 494_032_768,
    "qwen2/2.5-7b": 7_615_616_512,
    "qwen3/0.6b": 596_049_920,
    "qwen3/1.7b": 1_720_574_976,
    "qwen3/8b": 8_190_735_360,
    "qwen3_moe/30b-a3b": 30_532_122_624,
}
"""Parameters of the published checkpoints (a tied head counted once)."""


def test_every_model_has_its_recipes() -> None:
    kinds: dict[str, set[str]] = {folder: set() for folder in FOLDERS}
    for name in RECIPES:
        folder, _, kind = name.rpartition("/")
        kinds[folder].add(kind)
    for folder, found in kinds.items():
        family = families.find(published_config(recipe_folder() / folder / "any.yaml"))
        assert folder.startswith(f"{family.name}/")
        dense = {"moe", "w2-nested", "moe-w2-nested"}
        assert found == ({"w2-nested"} if family.experts else dense)


@pytest.mark.parametrize("folder", FOLDERS)
def test_published_configs_make_the_published_number_of_parameters(folder: str) -> None:
    config = published_config(recipe_folder() / folder / "any.yaml")
    tensors = families.promised_headers(Path("model"), config).tensors.values()
    assert sum(prod(info.shape) for _, info in tensors) == COUNTS[folder]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_does_what_its_name_says(name: str) -> None:
    recipe, (folder, _, kind) = load_recipe(RECIPES[name]), name.rpartition("/")
    assert recipe.name == name.replace("/", "-")
    assert recipe.extract.enabled == kind.startswith("moe")
    assert recipe.quantize.enabled == kind.endswith("w2-nested")
    plan = published_plan(recipe, RECIPES[name])
    assert plan.parameters == COUNTS[folder]
    if recipe.quantize.enabled:
        assert 2 < plan.sizes.bits_per_weight[2] < 2.6
        assert not plan.sizes.kept_float
    if recipe.extract.enabled:
        assert plan.experts is not None
        assert plan.experts.active_share == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("name", RECIPES)
def test_headers_are_what_the_plan_says(name: str) -> None:
    """Red after a change of the estimates: `fissile recipes header --write` renews all headers."""
    assert RECIPES[name].read_text() == with_header(RECIPES[name])


def test_headers_name_memory_disk_and_three_machines() -> None:
    text = "\n".join(header(RECIPES["llama/3.1-8b/w2-nested"]))
    assert "until measured" in text
    assert re.search(r"memory +\d+ GB in evaluate \(\d+ GB up to verify, in quantize\)", text)
    assert re.search(r"disk +\d+ GB", text)
    assert all(machine.name in text for machine in MACHINES)
    # 8 G parameters in float32 fit into 80 GB, not into 24.
    assert re.search(r"24 GB .*too small for evaluate\n.*80 GB .*every stage fits", text)


def test_a_header_is_replaced_and_what_follows_stays(tmp_path: Path) -> None:
    (tmp_path / PUBLISHED).write_bytes(
        (RECIPES["llama/3.2-1b/moe"].parent / PUBLISHED).read_bytes()
    )
    path = tmp_path / "own.yaml"
    path.write_text("# mine\nname: own\nextract: {enabled: false}\n")
    once = with_header(path)
    assert once.endswith("# mine\nname: own\nextract: {enabled: false}\n")
    path.write_text(once.replace("memory", "memori"))
    assert with_header(path) == once


def test_a_recipe_for_no_model_has_no_header() -> None:
    with pytest.raises(RecipeError, match=r"moe-nested\.yaml: is for no particular model"):
        header(EVERY["demo/moe-nested"])


# -- typos -------------------------------------------------------------------------------------


def leaves(data: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Places of all keys of a recipe, sections included."""
    for key, value in data.items():
        yield (*prefix, key)
        # Keys below these are widths, tasks and kinds of events.
        if isinstance(value, dict) and key not in ("omega", "recovery", "ledger"):
            yield from leaves(value, (*prefix, key))


def typos(word: str) -> set[str]:
    """A letter left out, doubled, exchanged with the next, and replaced."""
    middle = len(word) // 2
    found = {
        word[:-1],
        word[1:],
        word[:middle] + word[middle + 1 :],
        word[0] + word,
        word + word[-1],
        word[0] + word[2:3] + word[1] + word[3:],
        word[:middle] + "x" + word[middle + 1 :],
    }
    return found - {word}


def refusal(place: tuple[str, ...], word: str, value: Any) -> str:
    """Message for a recipe whose only key is misspelt."""
    data: dict[str, Any] = {word: value}
    for section in reversed(place[:-1]):
        data = {section: data}
    with pytest.raises(RecipeError) as caught:
        parse_recipe(data)
    return str(caught.value)


@pytest.mark.parametrize("name", EVERY)
def test_a_typo_in_any_field_is_refused_with_the_right_suggestion(name: str) -> None:
    resolved = load_recipe(EVERY[name]).model_dump(mode="json")
    raw = yaml.safe_load(EVERY[name].read_text())
    own = {*leaves(raw)}
    places = {*leaves(resolved), *own}
    assert len(places) > 100
    turn = list(EVERY).index(name)
    for i, place in enumerate(sorted(places)):
        # All kinds of typos in what the file itself says; of inherited values every eighth, so
        # that the recipes together cover all of them several times.
        words = sorted(typos(place[-1]))
        inherited = [words[turn % len(words)]] if (i + turn) % 8 == 0 else []
        for word in words if place in own else inherited:
            message = refusal(place, word, None)
            assert "\n" not in message
            suggestion = message.partition("did you mean ")[2]
            assert repr(place[-1]) in suggestion, message
            assert ".".join((*place[:-1], word)) in message


def test_words_of_a_choice_are_suggested_too() -> None:
    fields = {
        ("quantize", "effort"): ("blanced", "balanced"),
        ("route", "kind"): ("pregated", "pregate"),
        ("recover", "schedule"): ("cosin", "cosine"),
    }
    for place, (word, wanted) in fields.items():
        assert f"did you mean {wanted!r}" in refusal(place, place[-1], word)
    assert "'oracle'" in refusal(("evaluate", "controls"), "controls", ["static", "orcle"])
    assert "did you mean 'perplexity'" in refusal(
        ("limits", "recovery"), "recovery", {"perplexty": 0.9}
    )
    # A list where a word belongs.
    assert "quantize.effort" in refusal(("quantize", "effort"), "effort", ["fast"])


def test_a_key_in_the_wrong_section_is_shown_its_place() -> None:
    assert "did you mean 'quantize.widths'" in refusal(("widths",), "widths", [2])
    assert "did you mean 'extract.num_experts'" in refusal(
        ("route", "num_experts"), "num_experts", 8
    )


def test_a_misspelt_base_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "_base.yaml").write_text("seed: 3\n")
    path = tmp_path / "own.yaml"
    path.write_text("extends: _bas.yaml\n")
    with pytest.raises(RecipeError, match=r"own\.yaml: extends .*did you mean '_base\.yaml'"):
        load_recipe(path)
    path.write_text("extend: _base.yaml\n")
    with pytest.raises(RecipeError, match="extend: unknown key; did you mean 'extends'"):
        load_recipe(path)
    path.write_text("extends: _base.yaml\n")
    assert load_recipe(path).seed == 3


# -- schema ------------------------------------------------------------------------------------


VALIDATOR = jsonschema.Draft202012Validator(recipe_schema())


def valid(data: Any) -> bool:
    return bool(VALIDATOR.is_valid(data))


def test_the_schema_is_one() -> None:
    VALIDATOR.check_schema(VALIDATOR.schema)
    assert valid({})
    assert valid(Recipe().model_dump(mode="json"))


def test_the_schema_knows_every_recipe_and_none_of_its_typos() -> None:
    files = sorted(recipe_folder().rglob("*.yaml"))
    assert len(files) > len(EVERY) > 40
    places: set[tuple[str, ...]] = set()
    for path in files:
        raw = yaml.safe_load(path.read_text())
        assert valid(raw), path
        places |= {*leaves(raw)}
    for place in places | {*leaves(Recipe().model_dump(mode="json"))}:
        for word in typos(place[-1]):
            data: dict[str, Any] = {word: 1}
            for section in reversed(place[:-1]):
                data = {section: data}
            assert not valid(data), data


@pytest.mark.parametrize(
    "data",
    [
        {"quantize": {"omega": "2-bit first"}},
        {"quantize": {"omega": {"2": 4.0, "3": 1.0, "4": 1.0}}},
        {"recover": {"alternate": 8}},
        {"limits": {"recovery": {"perplexity": 0.9, "choices": {"2": 0.8}}}},
    ],
)
def test_the_schema_takes_what_recipes_take(data: dict[str, Any]) -> None:
    parse_recipe(data)
    assert valid(data)


@pytest.mark.parametrize(
    "data",
    [
        {"quantize": {"omega": "3-bit first"}},
        {"quantize": {"widths": [5]}},
        {"extract": {"active_share": 1.5}},
        {"recover": {"alternate": "often"}},
    ],
)
def test_the_schema_refuses_what_recipes_refuse(data: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        parse_recipe(data)
    assert not valid(data)
