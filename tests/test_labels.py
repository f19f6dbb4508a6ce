"""Labels of tokens read back as the text, by byte-level BPE and by SentencePiece with byte
fallback.

The truth is the text itself: whatever is encoded must be what its labels add up to.
"""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from spd_lightning.analysis.prompts import prompt_label, prompt_text, search_key
from spd_lightning.data import tokenized
from spd_lightning.labels import is_bytes, joined, token_label

TEXTS = st.text(
    st.characters(exclude_categories=["Cs"]), max_size=30
)  # any text that UTF-8 can write
HARD = [
    "a 👩",
    "e\u0301 é",  # a combining accent, and the composed letter
    "مرحبا \u200fשלום",  # right to left, with a mark
    "👩\u200d🔬 🏳️\u200d🌈",  # several characters that are drawn as one
    "<0xE2> <0x41>",  # text that looks like the label of a byte
    "\ufeff\ufffd\x00\x7f\x85\u2028",
]


@pytest.fixture(scope="module")
def byte_level() -> tokenized.Tokenizer:
    """A BPE over bytes as GPT-2's; a few merges run across the edges of characters, and one is a
    text like `<0x41>`.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(alphabet)}
    merges = []
    for left, right in [
        ("Ġ", "ð"),
        ("Ã", "©"),
        ("ð", "Ł"),
        ("<", "0"),
        ("<0", "x"),
        ("4", "1"),
        ("<0x", "41"),
        ("<0x41", ">"),
    ]:
        merges.append((left, right))
        vocab[left + right] = len(vocab)
    inner = Tokenizer(models.BPE(vocab, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return tokenized.Tokenizer(inner)


@pytest.fixture(scope="module")
def byte_fallback() -> tokenized.Tokenizer:
    """A vocabulary of three letters that writes everything else in bytes, as Llama 2 and Gemma
    do.
    """
    vocab = {"<unk>": 0, "▁": 1, "a": 2, "é": 3}
    vocab |= {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    inner = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenized.Tokenizer(inner)


def labels_of(tokenizer: tokenized.Tokenizer, text: str) -> list[str]:
    return [tokenizer.name(token) for token in tokenizer.encode(text)]


def with_hard_texts(test):
    for text in HARD:
        test = example(text=text)(test)
    return test


@with_hard_texts
@given(text=TEXTS)
def test_labels_of_byte_level_tokens_add_up_to_the_text(byte_level, text):
    assert joined(labels_of(byte_level, text)) == text


@with_hard_texts
@given(text=TEXTS)
def test_labels_of_fallback_bytes_add_up_to_the_text(byte_fallback, text):
    """The tokenizer itself writes a blank as ▁ and cannot tell the two apart."""
    assert joined(labels_of(byte_fallback, text)) == text.replace("▁", " ")


@given(content=st.binary(max_size=8))
def test_a_label_gives_back_its_bytes_wherever_they_are_text(content):
    label = token_label(content)
    assert joined([label]) == content.decode("utf-8", errors="replace")
    assert is_bytes(label) or label == content.decode()


@given(text=TEXTS, cut=st.integers(0, 40))
def test_a_window_that_cuts_a_character_loses_only_that_one(byte_level, text, cut):
    labels = labels_of(byte_level, text)
    before = joined(labels[:cut])
    after = joined(labels[cut:])
    assert text.startswith(before.rstrip("\ufffd"))
    assert text.endswith(after.lstrip("\ufffd"))


def test_parts_of_a_character_are_labeled_by_their_bytes(byte_level, byte_fallback):
    assert labels_of(byte_fallback, "a 👩") == ["a", " ", "<0xF0>", "<0x9F>", "<0x91>", "<0xA9>"]
    assert labels_of(byte_level, "é 👩") == ["é", "<0x20><0xF0>", "<0x9F>", "<0x91>", "<0xA9>"]
    assert labels_of(byte_fallback, "\n") == ["\n"]  # a byte that is a whole character
    assert labels_of(byte_level, "<0x41>") == ["".join(f"<0x{byte:02X}>" for byte in b"<0x41>")]


# ---- prompts -------------------------------------------------------------------------------------


def row(source: str, tokens: list[str]) -> dict[str, object]:
    return {"source": source, "tokens": tokens}


@given(text=TEXTS)
def test_a_prompt_is_found_by_its_own_text(byte_level, text):
    prompt = row("file 3", labels_of(byte_level, text))
    assert search_key(prompt_text(prompt)) == search_key(text)


def test_labels_of_prompts_are_text(byte_level):
    assert prompt_label(row("given 0", labels_of(byte_level, "é👩 b"))) == "given 0 · é👩 b"
    assert prompt_label(row("given 0", ["He", "llo"])) == "given 0 · Hello"  # one word has no blank
    assert (
        prompt_label(row("token 3", ["0", "12", "3"])) == "token 3 · 0 12 3"
    )  # token ids without a text


@pytest.mark.parametrize(
    ("given_text", "harvested"),
    [
        ("Two ones", " two ones"),  # a tokenizer in lower case, with a blank in front
        ("cafe\u0301", "café"),  # one that composes
        ("a.b", "a . b"),  # one that splits at signs and drops blanks
        ("ﬁne", "fine"),
    ],
)
def test_search_ignores_what_tokenizers_change(given_text, harvested):
    assert search_key(given_text) == search_key(harvested)
    assert search_key("another") != search_key(harvested)
