"""Configs: found by name, built on others, merged key by key, and told from wrong ones in one line."""

import random
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from spd_lightning import config
from spd_lightning.errors import BadInput

KEYS = st.sampled_from(["a", "b", "c", "d"])
VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
CONFIGS = st.recursive(
    st.dictionaries(KEYS, VALUES, max_size=3), lambda inner: st.dictionaries(KEYS, VALUES | inner, max_size=3)
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refused(name: str) -> str:
    with pytest.raises(BadInput) as caught:
        config.load(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- merging --------------------------------------------------------------------------------------------------------


def leaves(tree: dict, path: tuple = ()) -> dict:
    """Every value that is no non-empty dict, by its path: an independent view of a config."""
    found = {}
    for key, value in tree.items():
        found |= leaves(value, (*path, key)) if isinstance(value, dict) and value else {(*path, key): value}
    return found


@given(CONFIGS)
def test_nothing_is_neutral(tree):
    assert config.merge(tree, {}) == config.merge({}, tree) == config.merge(tree, tree) == tree


@given(CONFIGS, CONFIGS)
def test_what_is_on_top_wins(under, over):
    """Every leaf of the upper config is there; one of the lower is, unless something of the upper lies on its way."""
    merged, upper = leaves(config.merge(under, over)), leaves(over)
    assert {k: v for k, v in upper.items() if v != {}}.items() <= merged.items()
    for path, value in leaves(under).items():
        ways = {path[:n] for n in range(1, len(path) + 1)}
        if not ways & set(upper) and not any(p[: len(path)] == path for p in upper):
            assert merged[path] == value


@given(CONFIGS, CONFIGS)
def test_merging_changes_neither(under, over):
    before = yaml.safe_dump([under, over])
    config.merge(under, over)
    assert yaml.safe_dump([under, over]) == before


@given(CONFIGS, CONFIGS, CONFIGS)
def test_order_of_merging_is_all_that_counts(a, b, c):
    """Where no dict stands in for a plain value or the other way round, merging is associative."""
    kinds: dict[tuple, set] = {}

    def note(tree, path=()):
        for key, value in tree.items():
            kinds.setdefault((*path, key), set()).add(isinstance(value, dict))
            if isinstance(value, dict):
                note(value, (*path, key))

    for tree in (a, b, c):
        note(tree)
    if all(len(kind) == 1 for kind in kinds.values()):
        assert config.merge(config.merge(a, b), c) == config.merge(a, config.merge(b, c))


def test_lists_replace():
    assert config.merge({"x": [1, 2], "y": {"z": [1]}}, {"x": [3], "y": {"z": []}}) == {"x": [3], "y": {"z": []}}


# ---- chains of bases ------------------------------------------------------------------------------------------------


def test_a_chain_of_bases(here):
    write(here / "low.yaml", "a: 1\nb: {c: 1, d: 1}\nlist: [1, 2]\n")
    write(here / "middle.yaml", "base: low.yaml\nb: {c: 2}\n")
    write(here / "top.yaml", "base: middle\nb: {e: 3}\nlist: [9]\n")
    assert config.load("top") == {"a": 1, "b": {"c": 2, "d": 1, "e": 3}, "list": [9]}


def test_of_several_bases_the_last_wins(here):
    write(here / "one.yaml", "a: 1\nb: 1\n")
    write(here / "two.yaml", "b: 2\nc: 2\n")
    write(here / "top.yaml", "base: [one.yaml, two.yaml]\nc: 3\n")
    assert config.load("top.yaml") == {"a": 1, "b": 2, "c": 3}


def test_one_base_may_be_reached_twice(here):
    """Two configs on a common base are no cycle."""
    write(here / "root.yaml", "a: 0\n")
    write(here / "left.yaml", "base: root\nb: 1\n")
    write(here / "right.yaml", "base: root\nc: 2\n")
    write(here / "top.yaml", "base: [left, right]\n")
    assert config.load("top") == {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize("length", [1, 2, 5])
def test_cycles_are_refused(here, length):
    for k in range(length):
        write(here / f"c{k}.yaml", f"base: c{(k + 1) % length}.yaml\n")
    assert "builds on itself" in refused("c0")


def test_a_base_lies_beside_its_config_first(here, monkeypatch):
    """A config means the same wherever one stands."""
    write(here / "deep" / "top.yaml", "base: low.yaml\n")
    write(here / "deep" / "low.yaml", "right: true\n")
    write(here / "low.yaml", "right: false\n")
    assert config.load("deep/top.yaml") == {"right": True}
    monkeypatch.chdir(here / "deep")
    assert config.load(str(here / "deep" / "top.yaml")) == {"right": True}


# ---- names ----------------------------------------------------------------------------------------------------------


def test_where_names_are_looked_for(here):
    """As given, then with the suffix, then in ./configs, then among the shipped ones."""
    assert config.find("tms") == config.find("tms.yaml") == config.SHIPPED / "tms.yaml"
    inside = write(here / "configs" / "tms.yaml", "where: configs\n")
    assert config.find("tms").resolve() == inside.resolve()
    beside = write(here / "tms.yaml", "where: here\n")
    assert config.find("tms").resolve() == beside.resolve()
    assert config.find(str(beside)) == beside
    (here / "toy").mkdir()
    assert config.find("toy") == config.SHIPPED / "toy.yaml"  # a folder is no config


def test_every_shipped_config_loads_and_says_what_it_is():
    for path in config.SHIPPED.rglob("*.yaml"):
        assert isinstance(config.load(str(path)), dict)
        assert path.read_text(encoding="utf-8").startswith("# ")


def test_unknown_names_get_the_nearest():
    assert "did you mean 'tms_5-2'?" in refused("tms_52.yaml")
    assert "did you mean 'targets/tms_5-2'?" in refused("targets/tms_5_2")


@pytest.mark.parametrize(
    "text", ["a: [1\n", "- 1\n- 2\n", "just words\n", "a: 1\na\n", "a: \t{\n", "base: nowhere_at_all\n", "base: 3\n"]
)
def test_broken_configs_are_refused(here, text):
    write(here / "bad.yaml", text)
    assert "config '" in refused("bad.yaml")


def test_bytes_that_are_no_text_are_refused(here):
    (here / "bad.yaml").write_bytes(b"\xff\xfe\x00a")
    assert "not valid YAML" in refused("bad.yaml")


def test_an_empty_config_is_empty(here):
    write(here / "empty.yaml", "# nothing\n")
    assert config.load("empty") == {}


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("3.0e-3", 3e-3), ("-2E5", -2e5), ("+1e+2", 100.0), (".5", 0.5), ("5.", 5.0), ("1_000.5", 1000.5)],
)
def test_floats_as_people_write_them(here, text, value):
    write(here / "n.yaml", f"x: {text}\n")
    loaded = config.load("n")["x"]
    assert loaded == value
    assert type(loaded) is float


@pytest.mark.parametrize("text", ["10", "0", "-7", "1_000"])
def test_whole_numbers_stay_whole(here, text):
    write(here / "n.yaml", f"x: {text}\n")
    assert type(config.load("n")["x"]) is int


@pytest.mark.parametrize("text", ["1e", "e3", "1.2.3", "tms_5-2", "5-2", "-"])
def test_words_stay_words(here, text):
    write(here / "n.yaml", f"x: '{text}'\ny: {text if text != '-' else 'a-'}\n")
    assert isinstance(config.load("n")["y"], str)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**12), 10**12))
def test_numbers_survive(tmp_path_factory, number):
    path = write(tmp_path_factory.mktemp("n") / "n.yaml", f"x: {number!r}\n")
    loaded = config.load(str(path))["x"]
    assert loaded == number
    assert type(loaded) is type(number)


# ---- dumps and digests ----------------------------------------------------------------------------------------------


@given(CONFIGS)
@example({"word": "1e3", "number": 1e3, "text": "1"})
def test_what_is_dumped_is_loaded(tmp_path_factory, tree):
    path = write(tmp_path_factory.mktemp("d") / "d.yaml", config.dump(tree))
    assert config.load(str(path)) == tree


@given(CONFIGS, st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_change_a_digest(tree, chance):
    def shuffled(value, chance: random.Random):
        if not isinstance(value, dict):
            return value
        keys = list(value)
        chance.shuffle(keys)
        return {key: shuffled(value[key], chance) for key in keys}

    assert config.digest(shuffled(tree, chance)) == config.digest(tree)
    assert len(config.digest(tree)) == 12


@given(CONFIGS, CONFIGS)
def test_different_configs_have_different_digests(one, other):
    if yaml.safe_dump(one) != yaml.safe_dump(other):
        assert config.digest(one) != config.digest(other)
