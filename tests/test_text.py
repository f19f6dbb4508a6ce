"""Text as data: documents, tokens on disk, windows and prompts, against the files read plainly."""

import glob
import inspect
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from spd_lightning import BadInput, Text
from spd_lightning.data import corpora, tokenized
from spd_lightning.data.corpora import END, Corpus
from spd_lightning.data.stories.generator import story
from spd_lightning.data.tokenized import held_out

DOCUMENTS = [story(0, index).text for index in range(120)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder of all that is made, for all tests that only read."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("text")
        patch.setenv("SPD_RUNS", str(folder))
        (folder / "tales.txt").write_text("\n\n".join(DOCUMENTS))
        yield folder


@pytest.fixture
def fresh(root, tmp_path, monkeypatch):
    """The same, empty, for a test that looks at what is made."""
    monkeypatch.setenv("SPD_RUNS", str(tmp_path / "runs"))
    return tmp_path


@pytest.fixture(scope="module")
def tales(root):
    def make(**settings):
        return Text(
            str(root / "tales.txt"), **{"vocab": 300, "seq_len": 16, "batch_size": 5} | settings
        )

    return make


def written(data, name="tokens.bin"):
    """A stream as it lies on disk."""
    return np.fromfile(data.streams.folder / name, data.streams.facts["dtype"]).tolist()


def on_trainer(data, rank, world):
    data.trainer = SimpleNamespace(
        global_rank=rank, world_size=world, max_steps=10, global_step=0, lightning_module=None
    )
    return data


# --- windows


@pytest.mark.parametrize(("split", "file"), [("train", "tokens.bin"), ("val", "validation.bin")])
def test_windows_tile_the_stream_once_an_epoch(tales, split, file):
    data = tales(batch_size=1)
    stream = written(data, file)
    count = len(stream) // 16
    expected = sorted(stream[16 * i : 16 * i + 16] for i in range(count))
    epochs = [
        [data.batch(e * count + i, 0, split)[0].tolist() for i in range(count)] for e in range(2)
    ]
    assert count > 2
    assert [sorted(epoch) for epoch in epochs] == [expected, expected]
    assert epochs[0] != epochs[1]


def test_a_batch_is_a_pure_function_of_seed_split_step_rank_and_world(tales):
    places = [
        (step, rank, split, 3)
        for step in (0, 7, 300)
        for rank in range(3)
        for split in ("train", "val")
    ]
    one = tales()
    two = tales()
    other = tales(seed=1)
    forward = {place: one.batch(*place) for place in places}
    torch.manual_seed(99)
    assert all(torch.equal(two.batch(*place), forward[place]) for place in reversed(places))
    assert not all(torch.equal(other.batch(*place), forward[place]) for place in places)
    assert other.streams.folder == one.streams.folder
    assert all(batch.dtype == torch.int64 and batch.shape == (5, 16) for batch in forward.values())


@given(step=st.integers(0, 400), world=st.integers(1, 4), split=st.sampled_from(["train", "val"]))
def test_many_devices_see_together_what_one_with_a_larger_batch_sees(tales, step, world, split):
    together = tales(batch_size=2 * world).batch(step, 0, split, 1)
    assert torch.equal(
        torch.cat([tales(batch_size=2).batch(step, r, split, world) for r in range(world)]),
        together,
    )


def test_loaders_know_the_number_of_devices(tales):
    one = tales(batch_size=4)
    two = [on_trainer(tales(batch_size=2), rank, 2) for rank in range(2)]
    for step, *halves in zip(range(3), *(data.train_dataloader() for data in two), strict=False):
        assert torch.equal(torch.cat([half[0] for half in halves]), one.batch(step))
    for whole, *halves in zip(
        one.val_dataloader(), *(data.val_dataloader() for data in two), strict=True
    ):
        assert torch.equal(torch.cat(halves), whole)


def test_validation_batches_have_a_size_of_their_own(tales):
    assert [
        tuple(b.shape)
        for b in tales(validation_batches=2, validation_batch_size=3).val_dataloader()
    ] == [(3, 16)] * 2


# --- tokens


def test_streams_are_the_documents_one_after_another(tales):
    data = tales()
    plain = Tokenizer.from_file(str(data.streams.folder / "tokenizer.json"))
    expected = {False: [], True: []}
    for index, text in enumerate(DOCUMENTS):
        expected[held_out(index)] += [*plain.encode(text).ids, plain.token_to_id(END)]
    assert written(data) == expected[False]
    assert written(data, "validation.bin") == expected[True]
    facts = json.loads((data.streams.folder / "facts.json").read_text())
    assert (facts["tokens"], facts["validation_tokens"]) == (
        len(expected[False]),
        len(expected[True]),
    )
    assert facts["documents"] + facts["validation_documents"] == len(DOCUMENTS)
    assert data.vocab_size == facts["vocab"] == 300


def test_validation_is_apart_from_training(tales):
    train, validation = (
        tales().decode(written(tales(), f)).split(END)[:-1]
        for f in ("tokens.bin", "validation.bin")
    )
    assert sorted(train + validation) == sorted(DOCUMENTS)
    assert not set(train) & set(validation)
    assert sum(map(held_out, range(20_000))) == pytest.approx(400, abs=80)


@given(text=st.text())
def test_any_text_comes_back(tales, text):
    data = tales()
    assert data.decode(data.encode(text)) == text


@given(text=st.text(st.characters(max_codepoint=127)))
def test_names_are_the_text_in_pieces(tales, text):
    data = tales()
    assert "".join(data.names(data.encode(text))) == text


def test_names_of_parts_of_characters_and_of_no_token(tales):
    data = tales()
    assert data.names(data.encode("☃")) == ["<0xE2>", "<0x98>", "<0x83>"]
    assert data.names([data.encode(" the")[0], 300, data.streams.tokenizer.end]) == [
        " the",
        "<300>",
        END,
    ]


def test_training_a_tokenizer_twice_gives_the_same_one(root):
    corpus = Corpus(str(root / "tales.txt"))
    first, second = (tokenized.trained(corpus, 400).inner for _ in range(2))
    assert first.to_str() == second.to_str()
    assert first.get_vocab_size() == 400


@pytest.mark.parametrize(
    ("limit", "characters"),
    [
        (3000, 1_000_000),
        (500_000, 5_000_000),
        (999_999, 9_999_990),
        (1_000_000, 10_000_000),
        (None, 10_000_000),
    ],
)
def test_a_tokenizer_sees_ten_characters_for_each_token_that_is_wanted(
    fresh, monkeypatch, limit, characters
):
    """A few tokens need no tokenizer of ten million characters; many tokens keep that one."""

    class Seen(Exception):
        pass

    def trained(corpus, vocab, characters):
        raise Seen(characters)

    monkeypatch.setattr(tokenized, "trained", trained)
    with pytest.raises(Seen) as seen:
        tokenized.tokenized(Corpus("stories"), None, 257, limit)
    assert seen.value.args == (characters,)


def test_max_tokens_are_the_first_ones(tales):
    whole = tales()
    part = tales(max_tokens=500)
    assert written(part) == written(whole)[:500]
    assert part.streams.facts["max_tokens"] == 500


def test_large_vocabularies_take_four_bytes(fresh):
    vocab = {f"w{i}": i for i in (*range(40), 70_000)} | {END: 70_001}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.save(str(fresh / "words.json"))
    (fresh / "x.txt").write_text("w1 w70000 w2\n\nw3 w4")
    data = Text(str(fresh / "x.txt"), tokenizer=str(fresh / "words.json"), seq_len=2, batch_size=2)
    assert data.streams.facts["dtype"] == "uint32"
    assert data.vocab_size == 70_002
    assert written(data) == [1, 70_000, 2, 70_001]
    assert sorted(data.batch(0).tolist()) == [[1, 70_000], [2, 70_001]]


def test_a_tokenizer_puts_its_own_tokens_around_prompts_and_an_end_after_documents(fresh):
    inner = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "one": 2, "two": 3}, unk_token="one"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    inner.enable_truncation(1)
    inner.save(str(fresh / "tokenizer.json"))
    (fresh / "x.txt").write_text("one two\n\ntwo two")
    data = Text(str(fresh / "x.txt"), tokenizer=str(fresh), prompts=["two one two"])
    assert data.groups()[0].inputs.tolist() == [[0, 3, 2, 3]]
    assert not (fresh / "runs").exists()  # prompts with a tokenizer by name need no corpus
    assert written(data) == [2, 3, 1]
    assert written(data, "validation.bin") == [3, 3, 1]


# --- the cache


def test_what_is_tokenized_is_not_tokenized_again(fresh, root, monkeypatch):
    first = Text(str(root / "tales.txt"), vocab=300).batch(0)
    monkeypatch.setattr(tokenized, "_make", None)
    again = Text(str(root / "tales.txt"), vocab=300, seq_len=64, seed=0)
    assert torch.equal(again.batch(0), first)
    assert Text(str(root / "tales.txt"), vocab=300, seq_len=9).batch(0).shape == (64, 9)


@pytest.mark.parametrize("name", ["facts.json", "tokens.bin", "validation.bin", "tokenizer.json"])
@pytest.mark.parametrize("cut", ["gone", "half"])
def test_a_damaged_folder_is_made_anew(fresh, root, name, cut):
    whole = Text(str(root / "tales.txt"), vocab=300).streams
    path = whole.folder / name
    before = {
        file: (whole.folder / file).read_bytes()
        for file in ("facts.json", "tokens.bin", "tokenizer.json")
    }
    if cut == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (whole.folder / ".tokens.bin.123.new").write_bytes(b"left by a killed process")
    Text(str(root / "tales.txt"), vocab=300).prepare_data()
    assert {file: (whole.folder / file).read_bytes() for file in before} == before
    assert not list(whole.folder.glob(".*.new"))


def test_a_killed_tokenization_leaves_nothing_that_is_taken_for_whole(fresh, root, monkeypatch):
    def killed(corpus, tokenizer, limit, kind, train, validation):
        train.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenized, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            Text(str(root / "tales.txt"), vocab=300).prepare_data()
    data = Text(str(root / "tales.txt"), vocab=300)
    assert data.decode(written(data)).startswith(DOCUMENTS[0])


def test_who_comes_second_waits_for_the_first(fresh, root, monkeypatch):
    made = []
    make = tokenized._make
    monkeypatch.setattr(tokenized, "_make", lambda *args: (made.append(args[0]), make(*args)))
    with ThreadPoolExecutor(3) as pool:
        batches = list(
            pool.map(lambda _: Text(str(root / "tales.txt"), vocab=300).batch(0), range(3))
        )
    assert len(made) == 1
    assert all(torch.equal(batch, batches[0]) for batch in batches)


def test_a_changed_file_is_another_corpus(fresh):
    path = fresh / "x.txt"
    path.write_text("one\n\ntwo\n\nthree")
    first = Text(str(path), vocab=257, seq_len=4)
    assert first.decode(written(first)) == f"one{END}three{END}"
    path.write_text("one\n\ntwo\n\nother words")
    second = Text(str(path), vocab=257, seq_len=4)
    assert second.decode(written(second)) == f"one{END}other words{END}"
    assert first.decode(written(first)) == f"one{END}three{END}"


# --- corpora


def write_table(path, column="text"):
    rows = [{"n": index, column: text} for index, text in enumerate(DOCUMENTS[:7])] + [
        {"n": 7, column: None}
    ]
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    else:
        pl.DataFrame(rows).write_parquet(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_tables_give_the_texts_of_one_column(tmp_path, suffix):
    write_table(tmp_path / f"a{suffix}", "story")
    assert list(Corpus(str(tmp_path / f"a{suffix}"), "story").documents()) == DOCUMENTS[:7]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_in_a_folder(tmp_path, monkeypatch, streaming):
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write_table(tmp_path / "set" / "train.parquet")
    corpus = Corpus(f"hf:{tmp_path / 'set'}", streaming=streaming)
    assert list(corpus.documents()) == DOCUMENTS[:7]
    with pytest.raises(BadInput, match=r"no column 'words'; set column; choose from: n, text"):
        list(Corpus(corpus.name, "words", streaming=streaming).documents())
    with pytest.raises(BadInput, match="test"):
        list(Corpus(corpus.name, split="test", streaming=streaming).documents())
    assert corpus.fingerprint() != Corpus(corpus.name, "words").fingerprint()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one\nline\n\n\ntwo\n", ["one\nline", "two"]),
        (f"a\n\nb{END}c{END}\nd\n", ["a\n\nb", "c", "d"]),
        (f"{END}\n\na{END}", ["a"]),
        ("one", ["one"]),
        ("\n \n", []),
    ],
)
def test_documents_of_plain_text(tmp_path, content, expected):
    (tmp_path / "x.txt").write_text(content)
    assert list(Corpus(str(tmp_path / "x.txt")).documents()) == expected


def test_a_glob_takes_its_files_in_order(tmp_path):
    for name in "cab":
        (tmp_path / f"{name}.txt").write_text(f"{name} 1\n\n{name} 2")
    assert list(Corpus(str(tmp_path / "*.txt")).documents()) == [
        f"{n} {i}" for n in "abc" for i in (1, 2)
    ]


@pytest.mark.parametrize("name", ["a[1]", "x*y", "what?", "[ab]"])
def test_a_folder_may_be_named_like_a_pattern(tmp_path, name):
    """A file that is there is meant as it is written; patterns behind such a folder still work."""
    for folder in (name, "a1", "xzy", "whats", "a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "c[2].txt").write_text(folder)
    assert list(Corpus(str(tmp_path / name / "c[2].txt")).documents()) == [name]
    assert list(Corpus(str(tmp_path / name / "*.txt")).documents()) == [name]
    assert list(Corpus(str(tmp_path / "a?*" / "*.txt")).documents()) == [
        n for n in ("a1", "a[1]") if n in ("a1", name)
    ]


def test_a_dataset_in_a_folder_named_like_a_pattern_is_read_as_files(tmp_path):
    (tmp_path / "a[1]").mkdir()
    write_table(tmp_path / "a[1]" / "train.parquet")
    said = message_of(lambda: list(Corpus(f"hf:{tmp_path / 'a[1]'}").documents()))
    advised = said.rpartition("for example: ")[2]
    assert list(Corpus(advised).documents()) == DOCUMENTS[:7]


def test_text_from_a_terminal_that_is_not_in_utf_8(tales):
    assert r"\udcff is half of a character" in message_of(lambda: tales().encode("a \udcff"))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_byte_order_mark_is_no_part_of_a_corpus(tmp_path, suffix):
    content = "word" if suffix == ".txt" else '{"text": "word"}'
    (tmp_path / f"x{suffix}").write_text("\ufeff" + content, encoding="utf-8")
    assert list(Corpus(str(tmp_path / f"x{suffix}")).documents()) == ["word"]


def test_the_standard_library_is_sources_without_tests():
    documents = list(Corpus("stdlib").documents())
    assert [
        Path(inspect.getfile(module)).read_text() in documents
        for module in (json.decoder, glob, statistics)
    ] == [True] * 3
    assert documents[:20] == list(islice(Corpus("stdlib").documents(), 20))
    assert 3e6 < sum(map(len, documents)) < 3e7
    assert not any("class TestCase1_" in text or "import jaxtyping" in text for text in documents)


def test_stories_come_to_as_many_tokens_as_are_wanted(fresh):
    data = Text(max_tokens=3000, vocab=257, seq_len=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenized, "TRAINED_ON", 10_000)
        assert len(written(data)) == 3000
    assert data.decode(written(data)).startswith(f"{story(0, 0).text}{END}{story(0, 2).text}")
    assert data.decode(written(data, "validation.bin")).startswith(story(0, 1).text)


# --- prompts


def test_given_prompts_come_by_length_and_else_in_order(tales, fresh):
    (fresh / "more.txt").write_text("ab\nabc\n")
    data = tales(prompts=["abc", "☃", "xyz!", "x"], prompts_file=str(fresh / "more.txt"), vocab=257)
    groups = data.groups()
    assert [group.sources for group in groups] == [
        ["given 0", "given 1", "file 1"],
        ["given 2"],
        ["given 3"],
        ["file 0"],
    ]
    assert [group.inputs.shape[1] for group in groups] == [3, 4, 1, 2]
    assert groups[0].tokens == [["a", "b", "c"], ["<0xE2>", "<0x98>", "<0x83>"], ["a", "b", "c"]]
    assert {split for group in groups for split in group.splits} == {"given"}
    given_back = [data.decode(row.tolist()) for group in groups for row in group.inputs]
    assert given_back == ["abc", "☃", "abc", "xyz!", "x", "ab"]


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    world=st.integers(1, 4),
    size=st.integers(1, 3),
)
def test_ranks_share_ragged_prompts_without_padding_or_repetition(tales, lengths, world, size):
    texts = [chr(97 + index) * length for index, length in enumerate(lengths)]
    loaders = [
        on_trainer(
            tales(prompts=texts, vocab=257, predict_batch_size=size), rank, world
        ).predict_dataloader()
        for rank in range(world)
    ]
    batches = [list(loader) for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(found) for found in batches]
    rows = [
        row
        for found in batches
        for batch in found
        for row in zip(batch.sources, batch.tokens, strict=True)
    ]
    assert sorted(rows) == sorted((f"given {i}", list(text)) for i, text in enumerate(texts))
    assert all(
        len(batch.sources) == len(batch.inputs) <= size for found in batches for batch in found
    )
    shares = [sum(len(batch.sources) for batch in found) for found in batches]
    assert max(shares) - min(shares) <= 1


def test_prompts_of_a_jsonl_file(tales, fresh):
    (fresh / "p.jsonl").write_text('{"text": "one\\ntwo"}\n{"text": "x"}\n')
    groups = tales(prompts_file=str(fresh / "p.jsonl")).groups()
    assert ["".join(row) for group in groups for row in group.tokens or []] == ["one\ntwo", "x"]


PROMPTS = ["one two", "", "☃ 😀", "  ", "x"]  # as lines of a file, of which two are blank


def prompts_file(path, column):
    """The same prompts in any kind of file."""
    if path.suffix == ".txt":
        path.write_text("\ufeff" + "\n".join(PROMPTS), encoding="utf-8")
    elif path.suffix == ".jsonl":
        rows = [json.dumps({column: text}) if text else "" for text in PROMPTS]
        path.write_text("\ufeff" + "\r\n".join(rows), encoding="utf-8")
    else:
        pl.DataFrame({"n": range(6), column: [*PROMPTS, None]}).write_parquet(path)
    return str(path)


@pytest.mark.parametrize(("suffix", "blank"), [(".txt", 2), (".jsonl", 2), (".parquet", 3)])
def test_prompts_of_any_file_skip_and_count_blank_lines(tales, fresh, caplog, suffix, blank):
    """Their column is their own; a byte-order mark is no part of the first prompt."""
    file = prompts_file(fresh / f"p[1]*{suffix}", "question")
    data = tales(
        prompts_file=file, prompts_column="question", column="story", tokenizer=tokenizer_of(tales)
    )
    held = {
        source: data.decode(row.tolist())
        for group in data.groups()
        for source, row in zip(group.sources, group.inputs, strict=True)
    }
    assert held == {"file 0": "one two", "file 1": "☃ 😀", "file 2": "x"}
    assert f"{blank} blank lines were skipped" in caplog.text
    data.groups()
    assert caplog.text.count("blank lines") == 1  # said once, however often the file is read


def tokenizer_of(tales):
    return str(tales().streams.folder / "tokenizer.json")


def in_context(data, context):
    """Data on a trainer whose model takes that many tokens."""
    on_trainer(data, 0, 1)
    data.trainer.lightning_module = SimpleNamespace(network=SimpleNamespace(context=context))
    return data


def test_prompts_that_are_too_long_are_listed_all_at_once(tales, fresh):
    (fresh / "p.txt").write_text("ok\n\n" + "abcdefgh\n" * 12)
    data = in_context(
        tales(prompts=["a" * 7, "b"], prompts_file=str(fresh / "p.txt"), vocab=257), 5
    )
    said = message_of(data.groups)
    assert said.startswith(
        "prompts in Text: 13 cannot be used: given 0: 7 tokens, and the target's context holds 5; "
    )
    assert "line 3 of 'p.txt': 8 tokens, and the target's context holds 5; line 4 of" in said
    assert said.endswith("and 3 more; shorten it, or set too_long to skip or truncate")
    assert said.count("tokens, and") == 10


@pytest.mark.parametrize(
    ("choice", "expected", "line"),
    [
        (
            "skip",
            {"given 0": "abc", "file 1": "de"},
            "1 prompt was skipped for having more than the 5 tokens",
        ),
        (
            "truncate",
            {"given 0": "abc", "file 0": "12345", "file 1": "de"},
            "1 prompt was truncated to the 5 tokens",
        ),
    ],
)
def test_prompts_that_are_too_long_can_be_skipped_or_truncated(
    tales, fresh, caplog, choice, expected, line
):
    (fresh / "p.txt").write_text("12345678\nde\n")
    data = in_context(
        tales(prompts=["abc"], prompts_file=str(fresh / "p.txt"), vocab=257, too_long=choice), 5
    )
    held = {
        source: data.decode(row.tolist())
        for group in data.groups()
        for source, row in zip(group.sources, group.inputs, strict=True)
    }
    assert held == expected
    assert line in caplog.text


def test_when_all_prompts_are_skipped_that_is_said(tales):
    data = in_context(tales(prompts=["abcdef"], vocab=257, too_long="skip"), 5)
    assert "none is left" in message_of(data.groups)


def test_a_file_with_several_kinds_of_faults_lists_them_all(tales, fresh):
    (fresh / "p.jsonl").write_text(
        '{"text": "fine"}\n{"text": 3}\n[1]\n\n{"text": "\\udc00"}\n{"t": "x"}\nno\n'
    )
    said = message_of(tales(prompts_file=str(fresh / "p.jsonl")).groups)
    assert said.startswith(
        "prompts in Text: 5 cannot be used: line 2 of 'p.jsonl': column 'text' holds int, not "
        "text; "
    )
    for part in (
        "line 3 of 'p.jsonl': it holds list",
        r"line 5 of 'p.jsonl': \udc00 is half",
        "line 6",
        "line 7 of 'p.jsonl': not JSON",
    ):
        assert part in said


# --- tokens that a tokenizer puts around a text


@pytest.fixture
def with_marks(fresh):
    """A tokenizer of letters that puts <s> before a text and </s> behind it."""
    vocab = {"<s>": 0, "</s>": 1, "?": 2, "a": 3, "b": 4}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.add_special_tokens(["<s>", "</s>"])
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    inner.save(str(fresh / "marks.json"))
    return str(fresh / "marks.json")


@pytest.mark.parametrize(
    ("text", "ids", "twice"),
    [
        ("ab", [0, 3, 4, 1], []),
        ("<s>ab", [0, 3, 4, 1], ["<s>"]),
        ("ab</s>", [0, 3, 4, 1], ["</s>"]),
        ("<s>ab</s>", [0, 3, 4, 1], ["<s>", "</s>"]),
        ("<s><s>a", [0, 0, 3, 1], ["<s>"]),  # the author's own second one stays
        ("a<s>b", [0, 3, 0, 4, 1], []),
        ("<s>", [0, 1], ["<s>"]),
        ("aa", [0, 3, 3, 1], []),
    ],
)
def test_a_mark_that_the_tokenizer_adds_stands_there_once(with_marks, caplog, text, ids, twice):
    data = Text(tokenizer=with_marks, prompts=[text])
    assert data.groups()[0].inputs.tolist() == [ids]
    for name in ("<s>", "</s>"):
        assert (f"1 prompt contains '{name}', which the tokenizer also adds" in caplog.text) == (
            name in twice
        )
    assert data.encode(text) == ids  # intervene's


def test_without_prompts_windows_of_validation_text_are_taken(tales):
    data = tales(n_prompts=4, n_ctx=11)
    other = tales(n_prompts=4, n_ctx=11, seed=1)
    (group,) = data.groups()
    stream = written(data, "validation.bin")
    for row, source in zip(group.inputs, group.sources, strict=True):
        split, number = source.split()
        assert split == "validation"
        assert row.tolist() == stream[11 * int(number) :][:11]
    assert len(set(group.sources)) == 4
    assert group.splits == ["validation"] * 4
    assert group.sources == data.groups()[0].sources != other.groups()[0].sources
    assert tales(n_prompts=6, n_ctx=11).groups()[0].sources[:4] == group.sources
    assert tales(n_prompts=0).groups() == []


def test_windows_of_training_text_follow(tales, caplog):
    """They come after all windows of validation text, in an order of their own."""
    validation = len(written(tales(), "validation.bin")) // 16
    (group,) = tales(n_prompts=validation + 3).groups()
    assert group.splits == ["validation"] * validation + ["training"] * 3
    stream = written(tales(), "tokens.bin")
    for row, source in zip(group.inputs[-3:], group.sources[-3:], strict=True):
        number = int(source.removeprefix("training "))
        assert row.tolist() == stream[16 * number :][:16]
    assert f"has {validation} windows; 3 are of training text" in caplog.text


def test_fewer_windows_than_prompts_are_reported(tales, caplog):
    (group,) = tales(n_prompts=10**6).groups()
    tokens = [len(written(tales(), name)) // 16 for name in ("validation.bin", "tokens.bin")]
    assert len(set(group.sources)) == sum(tokens)
    assert f"n_prompts 1000000 in Text: the corpus has only {sum(tokens)} windows" in caplog.text


def test_a_config_names_its_settings(tales):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Text, "data")
    parsed = parser.parse_args(
        ['--data.prompts=["Mia said", "Tom"]', "--data.corpus=stdlib", "--data.n_ctx=7"]
    )
    data = Text(**vars(parsed.data))
    assert (data.given, data.corpus.name, data.n_ctx) == (["Mia said", "Tom"], "stdlib", 7)
    assert Text(prompts="Mia said").given == ["Mia said"]


# --- bad input


def message_of(make):
    with pytest.raises(BadInput) as error:
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq_len": 1}, "seq_len 1 in Text: it must be at least 2"),
        ({"vocab": 256}, "vocab 256 in Text: it must be at least 257"),
        ({"max_tokens": 0}, "max_tokens 0 in Text"),
        ({"n_ctx": 0}, "n_ctx 0 in Text"),
        ({"batch_size": 0}, "batch_size 0 in Text"),
        ({"validation_batch_size": 0}, "validation_batch_size 0 in Text"),
    ],
)
def test_bad_settings(settings, message):
    assert message in message_of(lambda: Text(**settings))


def files(folder):
    (folder / "empty.txt").write_text("\n\n")
    (folder / "short.txt").write_text("a few words")
    (folder / "odd.csv").write_text("a,b")
    (folder / "latin.txt").write_bytes("grüße".encode("latin-1"))
    (folder / "wide.txt").write_text("words", encoding="utf-16")
    (folder / "zeros.txt").write_text("words", encoding="utf-16-le")
    (folder / "late.txt").write_bytes(("a" * (2**20 - 1) + "ü" + "abcd").encode() + b"\xff")
    (folder / "half.txt").write_bytes(b"words" + "ü".encode()[:1])
    (folder / "half.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n{"text": "ab \\ud83d cd"}\n')
    (folder / "broken.jsonl").write_text('{"text": "fine"}\n{"text": ')
    (folder / "list.jsonl").write_text("[1]\n")
    (folder / "numbers.jsonl").write_text('{"text": 3}\n')
    (folder / "other.jsonl").write_text('{"body": "x", "title": "y"}\n')
    (folder / "broken.parquet").write_bytes(b"PAR1 and no more")
    pl.DataFrame({"body": ["x"], "title": ["y"]}).write_parquet(folder / "other.parquet")
    pl.DataFrame({"text": [["x"]]}).write_parquet(folder / "lists.parquet")
    return folder


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("empty.txt", ["it contains no text"]),
        ("short.txt", ["training tokens, and a window needs 64", "more text", "seq_len"]),
        ("odd.csv", ["odd.csv", "not a .txt, .jsonl or .parquet file"]),
        (
            "latin.txt",
            [
                "latin.txt",
                "not UTF-8 at byte 2",
                "may be Latin-1",
                "iconv -f WINDOWS-1252 -t UTF-8",
            ],
        ),
        (
            "wide.txt",
            ["wide.txt", "not UTF-8 at byte 0", "looks like UTF-16", "iconv -f UTF-16 -t UTF-8"],
        ),
        ("zeros.txt", ["looks like UTF-16"]),
        ("late.txt", [f"not UTF-8 at byte {2**20 + 5}"]),
        ("half.txt", ["not UTF-8 at byte 5"]),
        ("half.jsonl", [r"line 2: \ud83d is half of a character", "half.jsonl"]),
        ("broken.jsonl", ["line 2: not JSON"]),
        ("list.jsonl", ["line 1: it holds list", "one object per line"]),
        ("numbers.jsonl", ["column 'text' holds int, not text"]),
        ("other.jsonl", ["no column 'text'", "choose from: body, title"]),
        ("other.parquet", ["no column 'text'", "choose from: body, title"]),
        ("lists.parquet", ["column 'text' holds list, not text"]),
        ("broken.parquet", ["broken.parquet", "cannot be read as Parquet"]),
        ("none.txt", ["none.txt", "no such file", "stories, stdlib"]),
        ("*.md", ["*.md", "no such file"]),
        ("", ["not a .txt, .jsonl or .parquet file", "*.txt"]),
    ],
)
def test_bad_corpora(fresh, name, parts):
    said = message_of(lambda: Text(str(files(fresh) / name), vocab=257).batch(0))
    assert all(part in said for part in parts), said


def test_too_little_validation_text_is_said(fresh):
    (fresh / "x.txt").write_text("a" * 200 + "\n\nb")
    data = Text(str(fresh / "x.txt"), vocab=257, batch_size=1)
    assert data.batch(0).shape == (1, 64)
    for make in (lambda: data.batch(0, 0, "val"), data.groups):
        assert "2 validation tokens, and a window needs 64; give it more documents" in message_of(
            make
        )


def test_misspelt_corpora_and_tokenizers(fresh):
    assert "did you mean 'stories'?" in message_of(lambda: Text("storys").batch(0))
    assert "no such tokenizer.json; omit tokenizer" in message_of(
        lambda: Text(tokenizer="./none").vocab_size
    )
    (fresh / "bad.json").write_text("{}")
    assert "cannot be read" in message_of(
        lambda: Text(tokenizer=str(fresh / "bad.json")).vocab_size
    )


def test_the_hub_without_a_network(fresh, monkeypatch):
    for module in (corpora, tokenized):
        monkeypatch.setattr(module, "hub_answers", lambda: False)
    said = message_of(lambda: Text("hf:nobody/nothing", vocab=257).batch(0))
    assert "corpus 'hf:nobody/nothing': not on this machine, and no network" in said
    assert "stories and stdlib need no network" in said
    said = message_of(lambda: Text(tokenizer="nobody/nothing").vocab_size)
    assert "tokenizer 'nobody/nothing': not on this machine, and no network" in said


@pytest.mark.parametrize("package", ["tokenizers", "datasets"])
def test_without_the_extra(fresh, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    corpus = "hf:x/y" if package == "datasets" else "stories"
    assert f"needs {package}; pip install 'spd_lightning[lm]'" in message_of(
        lambda: Text(corpus).batch(0)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": ["Mia", ""]}, "given 1: it is empty; give it a text or leave it out"),
        ({"prompts": ["a", "b \ud83d"]}, r"given 1: \ud83d is half of a character"),
        ({"prompts_file": "blank.txt"}, "it contains no prompts"),
        ({"prompts_file": "nothing.txt"}, "it contains no prompts"),
        ({"prompts_file": "none.txt"}, "none.txt': cannot be read"),
        (
            {"prompts_file": "other.jsonl"},
            "line 1 of 'other.jsonl': no column 'text'; set prompts_column; choose from: body",
        ),
    ],
)
def test_bad_prompts(tales, fresh, settings, message):
    (fresh / "blank.txt").write_text("\n \n")
    (fresh / "nothing.txt").write_text("")
    (fresh / "other.jsonl").write_text('{"body": "x"}')
    placed = {k: str(fresh / v) if k == "prompts_file" else v for k, v in settings.items()}
    assert message in message_of(tales(**placed).groups)
