"""Configs: found by name, built on others, merged key by key, and told from wrong ones in one
line.
"""

import random
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from spd_lightning import config
from spd_lightning.errors import BadInput

KEYS = st.sampled_from(["a", "b", "c", "d"])
VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=3)
    | st.lists(st.integers(), max_size=2)
)
CONFIGS = st.recursive(
    st.dictionaries(KEYS, VALUES, max_size=3),
    lambda inner: st.dictionaries(KEYS, VALUES | inner, max_size=3),
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


# ---- merging -------------------------------------------------------------------------------------


def leaves(tree: dict, path: tuple = ()) -> dict:
    """Every value that is no non-empty dict, by its path: an independent view of a config."""
    found = {}
    for key, value in tree.items():
        found |= (
            leaves(value, (*path, key))
            if isinstance(value, dict) and value
            else {(*path, key): value}
        )
    return found


@given(CONFIGS)
def test_nothing_is_neutral(tree):
    assert config.merge(tree, {}) == config.merge({}, tree) == config.merge(tree, tree) == tree


@given(CONFIGS, CONFIGS)
def test_what_is_on_top_wins(under, over):
    """Every leaf of the upper config is there; one of the lower is, unless something of the upper
    lies on its way.
    """
    merged = leaves(config.merge(under, over))
    upper = leaves(over)
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
    assert config.merge({"x": [1, 2], "y": {"z": [1]}}, {"x": [3], "y": {"z": []}}) == {
        "x": [3],
        "y": {"z": []},
    }


# ---- chains of bases -----------------------------------------------------------------------------


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


# ---- names ---------------------------------------------------------------------------------------


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
    "text",
    [
        "a: [1\n",
        "- 1\n- 2\n",
        "just words\n",
        "a: 1\na\n",
        "a: \t{\n",
        "base: nowhere_at_all\n",
        "base: 3\n",
    ],
)
def test_broken_configs_are_refused(here, text):
    write(here / "bad.yaml", text)
    assert "config '" in refused("bad.yaml")


def test_bytes_that_are_no_text_are_refused(here):
    (here / "bad.yaml").write_bytes(b"\xff\xfe\x00a")
    assert "not UTF-8 at byte 0" in refused("bad.yaml")


def test_an_empty_config_is_empty(here):
    write(here / "empty.yaml", "# nothing\n")
    assert config.load("empty") == {}


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("3.0e-3", 3e-3),
        ("-2E5", -2e5),
        ("+1e+2", 100.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("1_000.5", 1000.5),
    ],
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


# ---- dumps and digests ---------------------------------------------------------------------------


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


# ---- characters ----------------------------------------------------------------------------------

ANY_TEXT = st.text(
    st.characters(exclude_categories=["Cs"]), max_size=12
)  # all that UTF-8 can write
ANY_CONFIG = st.recursive(
    st.dictionaries(ANY_TEXT, ANY_TEXT | st.integers() | st.none(), max_size=3),
    lambda inner: st.dictionaries(ANY_TEXT, st.lists(ANY_TEXT, max_size=2) | inner, max_size=2),
)
HARD = "😀 👩\u200d🔬 e\u0301 \u200fשלום \ufeff\x85\u2028\x7f\x00 \\ud83d"


@given(tree=ANY_CONFIG)
@example(tree={"a": {HARD: [HARD]}})
def test_a_config_in_any_script_is_read_back(tmp_path_factory, tree):
    """The copy that a run keeps, and the line that jsonargparse is given."""
    path = tmp_path_factory.getbasetemp() / "copy.yaml"
    path.write_text(config.dump({"x": tree}), encoding="utf-8", newline="")
    assert config.load(str(path)) == {"x": tree}
    line = config.one_line(tree)
    assert line.isascii()
    assert line.isprintable()
    assert yaml.safe_load(line) == tree


def test_emoji_in_configs_and_overrides_reach_the_settings(here):
    """jsonargparse reads and writes settings with YAML of its own; what a run keeps must be what
    was given.
    """
    from spd_lightning.training.session import Settings, quiet

    write(
        here / "mine.yaml",
        "data:\n  init_args:\n    prompts: ['Hi 😀', 'e\u0301 שלום', \"a\\x85b\"]\n",
    )
    given = config.merge(config.load("stories-1L-tiny"), config.load("mine"))
    with quiet():
        from_file = Settings(given)
        from_words = Settings(given, ['--data.init_args.prompts=["Ho 👩\u200d🔬"]'])
    for settings, prompts in (
        (from_file, ["Hi 😀", "e\u0301 שלום", "a\x85b"]),
        (from_words, ["Ho 👩\u200d🔬"]),
    ):
        assert settings.config["data"]["init_args"]["prompts"] == prompts
        write(here / "copy.yaml", config.dump(settings.settings))
        assert config.load("copy.yaml")["data"]["init_args"]["prompts"] == prompts


def test_a_byte_order_mark_is_no_part_of_a_config(here):
    write(here / "x.yaml", "\ufeffa: 1\nb: |\n  two\n")
    assert config.load("x") == {"a": 1, "b": "two\n"}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("a: ü".encode("utf-16"), ["not UTF-8 at byte 0", "looks like UTF-16", "iconv"]),
        ("a: ü".encode("latin-1"), ["not UTF-8 at byte 3", "may be Latin-1", "iconv"]),
        (b'a: "\\ud83d"', ["\\ud83d is half of a character"]),
        (b"a: {1: x, b: y}", ["the key 1 is not text; put it in quotes"]),
        (
            b"a: [{2024-01-01: x}]",
            ["the key datetime.date(2024, 1, 1) is not text; put it in quotes"],
        ),
    ],
)
def test_other_encodings_are_rejected(here, content, parts):
    (here / "x.yaml").write_bytes(content)
    said = refused("x")
    assert all(part in said for part in ["x.yaml", *parts]), said


# ---- a key twice ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "place"),
    [
        ("a: 1\nb: 2\na: 3\n", "a", "on lines 1 and 3"),
        ("a:\n  - b: {c: 1, d: 2, c: 1}\n", "c", "on line 2"),
        ("a: 1\n'a': 2\n", "a", "on lines 1 and 2"),
        ("a: &x {b: 1}\nc: {<<: *x, d: 1,\n d: 2}\n", "d", "on lines 2 and 3"),
    ],
)
def test_a_key_twice_is_rejected(here, text, key, place):
    write(here / "low.yaml", text)
    write(here / "top.yaml", "base: low\n")
    said = refused("top")
    assert "low.yaml" in said
    assert f"key '{key}' is given twice, {place}; keep one" in said


def test_what_overrides_a_merged_key_is_not_there_twice(here):
    write(here / "x.yaml", "a: &x {b: 1, c: 1}\nd: {<<: *x, b: 2}\ne: {f: {b: 3}, b: 4}\n")
    assert config.load("x") == {
        "a": {"b": 1, "c": 1},
        "d": {"b": 2, "c": 1},
        "e": {"f": {"b": 3}, "b": 4},
    }


def test_a_key_twice_in_an_override_is_rejected(here):
    from spd_lightning.training.session import Settings, quiet

    path = write(here / "trainer.yaml", "max_steps: 1\nlogger: false\nmax_steps: 2\n")
    tiny = config.load("tms_5-2")
    with (
        quiet(),
        pytest.raises(
            BadInput, match=r"trainer\.yaml': key 'max_steps' is given twice, on lines 1 and 3"
        ),
    ):
        Settings(tiny, [f"--trainer={path}"])
    with quiet(), pytest.raises(BadInput, match=r"key 'max_steps' is given twice, on line 1"):
        Settings(tiny, ["--trainer={max_steps: 1, max_steps: 2}"])


BOMB = "a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8]\n" + "".join(
    f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (BOMB, "more than 100,000 values once its aliases are written out"),
        ("model: &a\n  init_args: *a\n", "nested more than 50 levels deep"),
        ("x: &a [*a]\n", "nested more than 50 levels deep"),
        ("x: !!binary aGVsbG8=\n", "has the type bytes; put it in quotes"),
        ("x: !!set {a, b}\n", "has the type set; put it in quotes"),
        ("x: 2020-01-01\n", "has the type date; put it in quotes"),
    ],
    ids=["bomb", "a map in itself", "a list in itself", "bytes", "set", "date"],
)
def test_aliases_and_values_that_no_config_can_hold(here, text, part):
    (here / "odd.yaml").write_text(text)
    with pytest.raises(BadInput, match=r"^config 'odd\.yaml': ") as caught:
        config.load("odd.yaml")
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bases_named_again_and_again_are_loaded_once(here, monkeypatch):
    """Each of 30 configs names the one before twice: 31 files are read, not 2^30."""
    (here / "b0.yaml").write_text("x: {a: 1}\n")
    for k in range(1, 31):
        (here / f"b{k}.yaml").write_text(f"base: [b{k - 1}, b{k - 1}.yaml]\nx: {{b{k}: {k}}}\n")
    read = list[Path]()
    real = config.read_file
    monkeypatch.setattr(config, "read_file", lambda path: read.append(path) or real(path))
    assert config.load("b30.yaml") == {"x": {"a": 1} | {f"b{k}": k for k in range(1, 31)}}
    assert len(read) == 31


def test_a_long_chain_of_bases_is_rejected(here):
    (here / "c0.yaml").write_text("x: 1\n")
    for k in range(1, 100):
        (here / f"c{k}.yaml").write_text(f"base: c{k - 1}.yaml\n")
    assert config.load("c50.yaml") == {"x": 1}
    with pytest.raises(
        BadInput, match=r"config 'c99\.yaml': it builds on a chain of more than 50 configs"
    ):
        config.load("c99.yaml")


def test_a_base_next_to_its_config_needs_no_suffix(here):
    (here / "deep").mkdir()
    (here / "deep/under.yaml").write_text("x: 1\n")
    (here / "deep/over.yaml").write_text("base: under\ny: 2\n")
    (here / "none.yaml").write_text("base:\nx: 3\n")
    assert config.load("deep/over.yaml") == {"x": 1, "y": 2}
    assert config.load("none.yaml") == {"x": 3}


@pytest.mark.parametrize("name", ["a\nb", "x" * 5000, "a\x1b[31m"])
def test_an_odd_name_is_shown_on_one_short_line(here, name):
    with pytest.raises(BadInput) as caught:
        config.load(name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
