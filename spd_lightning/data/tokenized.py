"""A corpus as token ids: tokenized once, kept in a folder, read from disk as it is needed.

1. The tokenizer is opened or, where none is named, a byte-level BPE is trained on the corpus.
2. Documents are told apart: about one in fifty is for validation, by a hash of its number.
3. Either part becomes one stream of ids, an end-of-text token after every document.

    <root>/data/<digest>/    tokenizer.json, tokens.bin, validation.bin, facts.json (written last)

The digest stands for all that the streams depend on; a folder without its facts, or at odds with
them, is made again.
"""

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm.auto import tqdm

from spd_lightning import files, json_files, labels
from spd_lightning.config import digest
from spd_lightning.data.corpora import END, Corpus, library
from spd_lightning.digests import digest as file_digest
from spd_lightning.errors import BadInput
from spd_lightning.targets.huggingface import hub_answers, quietly

LAYOUT = 1  # of the folder
ENDLESS = 4_000_000  # training tokens of a corpus that has no end
ALPHABET = 257  # tokens of the smallest byte-level BPE: the bytes and the end of a text
TRAINED_ON = 10_000_000  # characters that suffice for a BPE
AT_ONCE = 200_000  # characters tokenized together
ENDS = (
    END,
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<|im_end|>",
    "[SEP]",
)  # by which tokenizers mark a document's end
_HELD_OUT = 50
_HELD = ("tokenizer.json", "tokens.bin", "validation.bin")


# ---- tokenizers ----------------------------------------------------------------------------------


class Tokenizer:
    """Text to token ids and back.

    Args:
        inner: a tokenizer of the package tokenizers.
    """

    def __init__(self, inner: Any) -> None:
        inner.no_truncation()
        inner.no_padding()
        self.inner = inner
        self._names = dict[int, str]()

    @cached_property
    def size(self) -> int:
        """One more than the largest token id."""
        return max(self.inner.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def end(self) -> int | None:
        """The token after a document; None where the tokenizer has none."""
        return next(
            (found for name in ENDS if (found := self.inner.token_to_id(name)) is not None), None
        )

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with those that the tokenizer itself puts around one."""
        return self.inner.encode(text).ids

    def encode_prompt(self, text: str) -> tuple[list[int], list[str]]:
        """The tokens of a prompt, and the names of those that it brought itself although the
        tokenizer adds them.

        Of a beginning-of-text token that stands there twice, once by the tokenizer and once by the
        prompt, one is kept; so it is at the end. A model sees two of them nowhere in its training.
        """
        ids = self.encode(text)
        own = self.inner.encode(text, add_special_tokens=False).ids
        if not own or len(ids) == len(own):
            return ids, []
        repeated = list[str]()
        front = _added_in_front(ids, own)
        if front and ids[front - 1] == own[0]:
            repeated.append(self.name(own[0]))
            del ids[front]
            own = own[1:]
        end = front + len(own)
        if own and end < len(ids) and ids[end] == own[-1]:
            repeated.append(self.name(own[-1]))
            del ids[end]
        return ids, repeated

    def decode(self, ids: list[int]) -> str:
        """The text of some tokens."""
        return self.inner.decode(ids, skip_special_tokens=False)

    def name(self, token: int) -> str:
        """The label of one token, as `labels` explains it: its text, or `<0xE2>` for a part of a
        character.
        """
        if token not in self._names:
            self._names[token] = self._name(token)
        return self._names[token]

    @cached_property
    def _fallback(self) -> dict[str, int]:
        """The tokens by which SentencePiece writes single bytes; empty in a vocabulary without one
        for each byte.
        """
        named = {f"<0x{byte:02X}>": byte for byte in range(256)}
        whole = all(self.inner.token_to_id(piece) is not None for piece in named)
        return named if whole else {}

    def _name(self, token: int) -> str:
        piece = self.inner.id_to_token(token)
        if piece is None:
            return f"<{token}>"
        if piece in self._fallback:
            return labels.token_label(bytes([self._fallback[piece]]))
        if piece.startswith("▁"):  # a space, which decoding drops at the start
            return piece.replace("▁", " ")
        text = self.decode([token])
        if "\ufffd" in text and all(letter in _BYTES for letter in piece):
            return labels.token_label(bytes(_BYTES[letter] for letter in piece))
        return labels.token_label(text.encode())


def _added_in_front(ids: list[int], own: list[int]) -> int:
    """How many tokens a tokenizer put before a text's own."""
    starts = range(len(ids) - len(own) + 1)
    return next((start for start in reversed(starts) if ids[start : start + len(own)] == own), 0)


def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level BPE writes bytes (GPT-2's): printable ones stand for
    themselves.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


_BYTES = _byte_letters()


def opened(reference: str) -> Tokenizer:
    """A tokenizer by its file, the folder with its tokenizer.json, or its name on the hub.

    Raises:
        BadInput: there is none, or it cannot be read.
    """
    path = Path(reference).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.exists():
        path = _fetched(reference)
    try:
        return Tokenizer(
            library("tokenizers", f"tokenizer '{reference}'").Tokenizer.from_file(str(path))
        )
    except BadInput:
        raise
    except Exception as error:  # of tokenizers, which raises no other kind
        raise BadInput(
            f"tokenizer '{path}': cannot be read ({error}); give a tokenizer.json"
        ) from error


def _fetched(reference: str) -> Path:
    if (
        reference.startswith((".", "/", "~"))
        or reference.endswith(".json")
        or reference.count("/") > 1
    ):
        raise BadInput(
            f"tokenizer '{reference}': no such tokenizer.json; leave tokenizer out to train one on "
            "the corpus"
        )
    hub = library("huggingface_hub", f"tokenizer '{reference}'")
    reachable = hub_answers()
    try:
        with quietly():
            return Path(
                hub.hf_hub_download(reference, "tokenizer.json", local_files_only=not reachable)
            )
    except Exception as error:  # of the hub's client and what it is built on
        why = (
            " ".join(str(error).split())[:160]
            if reachable
            else "not on this machine, and no network to fetch it"
        )
        raise BadInput(
            f"tokenizer '{reference}': {why}; leave tokenizer out to train one on the corpus"
        ) from error


def trained(corpus: Corpus, vocab: int) -> Tokenizer:
    """A byte-level BPE of that many tokens, trained on the first ten million characters that are
    not for validation.
    """
    tokenizers = library("tokenizers", f"corpus '{corpus.name}'")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    options = {
        "vocab_size": vocab,
        "special_tokens": [END],
        "initial_alphabet": alphabet,
        "show_progress": False,
    }
    texts = (text for index, text in enumerate(corpus.documents()) if not held_out(index))
    inner.train_from_iterator(_first(texts, TRAINED_ON), tokenizers.trainers.BpeTrainer(**options))
    return Tokenizer(inner)


def _first(texts: Iterator[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return


# ---- streams -------------------------------------------------------------------------------------


def held_out(index: int) -> bool:
    """Whether the document of this number is for validation: one in fifty, and the second, for the
    sake of few.
    """
    key = hashlib.blake2b(f"held out {index}".encode(), digest_size=8).digest()
    return index == 1 or (index > 0 and int.from_bytes(key) % _HELD_OUT == 0)


@dataclass(frozen=True)
class Streams:
    """The tokens of a corpus, on disk."""

    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray
    facts: dict[str, Any]
    folder: Path


def tokenized(corpus: Corpus, tokenizer: str | None, vocab: int, max_tokens: int | None) -> Streams:
    """The tokens of a corpus, made unless that has been done; other processes that want them wait.

    Args:
        corpus: the text.
        tokenizer: file, folder or hub name of a tokenizer; None trains one.
        vocab: how many tokens one that is trained gets.
        max_tokens: training tokens to stop at; None takes the whole corpus, and four million of an
            endless one.

    Raises:
        BadInput: the corpus or the tokenizer cannot be had, or there is no text in the corpus.
    """
    own = None if tokenizer is None else opened(tokenizer)
    limit = max_tokens or (ENDLESS if corpus.endless else None)
    made_by = vocab if own is None else own.inner.to_str()
    folder = files.root() / "data" / digest([LAYOUT, corpus.fingerprint(), made_by, limit])
    with _locked(folder):
        if (found := _read(folder)) is None:
            _make(folder, corpus, own or trained(corpus, vocab), limit)
            found = _read(folder)
    assert found is not None
    return found


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(folder: Path) -> Streams | None:
    """Read the content of the folder; None if it is not complete."""
    try:
        facts = json_files.parsed((folder / "facts.json").read_bytes(), dict[str, Any])
        if any(file_digest(folder / name) != facts["digests"][name] for name in _HELD):
            return None
        sizes = {"tokens.bin": facts["tokens"], "validation.bin": facts["validation_tokens"]}
        kind = np.dtype(facts["dtype"])
        if any(
            (folder / name).stat().st_size != size * kind.itemsize for name, size in sizes.items()
        ):
            return None
        train, validation = (
            np.memmap(folder / name, kind, "r") if n else np.empty(0, kind)
            for name, n in sizes.items()
        )
        return Streams(opened(str(folder / "tokenizer.json")), train, validation, facts, folder)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ):  # BadInput of an unreadable tokenizer is a ValueError
        return None


def _make(folder: Path, corpus: Corpus, tokenizer: Tokenizer, limit: int | None) -> None:
    for left in folder.glob(".*.new"):  # by a process that was killed
        left.unlink()
    (folder / "facts.json").unlink(missing_ok=True)
    with files.whole(folder / "tokenizer.json") as path:
        tokenizer.inner.save(str(path))
    kind = np.dtype(np.uint16 if tokenizer.size <= 1 << 16 else np.uint32)
    with (
        files.whole(folder / "tokens.bin") as train,
        files.whole(folder / "validation.bin") as validation,
    ):
        with open(train, "wb") as train_file, open(validation, "wb") as validation_file:
            counts = _write(corpus, tokenizer, limit, kind, train_file, validation_file)
        if not counts["tokens"]:
            raise BadInput(
                f"corpus '{corpus.name}': there is no text in it; give one that has some"
            )
    facts = {"dtype": kind.name, "vocab": tokenizer.size, "end": tokenizer.end, "max_tokens": limit}
    facts |= {
        "corpus": asdict(corpus),
        "digests": {name: file_digest(folder / name) for name in _HELD},
    }
    with files.whole(folder / "facts.json") as path:
        path.write_text(json_files.dumped(counts | facts, indent=1), encoding="utf-8")


def _write(
    corpus: Corpus,
    tokenizer: Tokenizer,
    limit: int | None,
    kind: np.dtype,
    train: BinaryIO,
    validation: BinaryIO,
) -> dict[str, int]:
    """Both streams; returns how many documents and tokens went into each."""
    counts: dict[str, int] = dict.fromkeys(
        ("documents", "tokens", "validation_documents", "validation_tokens"), 0
    )
    end = [] if tokenizer.end is None else [tokenizer.end]
    bar = tqdm(
        desc=f"tokenize {corpus.name}",
        unit="tok",
        unit_scale=True,
        total=limit,
        delay=1,
        dynamic_ncols=True,
    )
    with bar:
        for numbered in _batches(enumerate(corpus.documents())):
            encoded = tokenizer.inner.encode_batch_fast(
                [text for _, text in numbered], add_special_tokens=False
            )
            for (index, _), found in zip(numbered, encoded, strict=True):
                prefix, file = ("validation_", validation) if held_out(index) else ("", train)
                left = None if limit is None or prefix else limit - counts["tokens"]
                ids = np.array([*found.ids, *end][:left], kind)
                file.write(ids.tobytes())
                counts[f"{prefix}documents"] += 1
                counts[f"{prefix}tokens"] += len(ids)
                if limit is not None and counts["tokens"] >= limit:
                    return counts
            bar.update(counts["tokens"] - bar.n)
    return counts


def _batches(documents: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Documents in lists, each as long as is tokenized together."""
    for first in documents:
        room = AT_ONCE - len(first[1])
        batch = [first]
        while room > 0 and (more := next(documents, None)):
            batch.append(more)
            room -= len(more[1])
        yield batch
