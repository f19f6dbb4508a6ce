"""A corpus as token ids: tokenized once, saved in a folder, and read from disk as needed.

1. Open the tokenizer or, if none is named, train a byte-level BPE on the corpus.
2. Split the documents: a hash of its number sends about one in fifty to validation.
3. Write each part as one stream of ids, with an end-of-text token after every document.

    <root>/data/<digest>/    tokenizer.json, tokens.bin, validation.bin, facts.json (written last)

The digest covers everything that the streams depend on. A folder whose facts are missing or do not
match its files is written again.
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
from spd_lightning.paths import expanded
from spd_lightning.targets.gguf import is_gguf
from spd_lightning.targets.huggingface import hub_answers, quietly, tokenizer_in_gguf

LAYOUT = 1  # version of the folder's layout
ENDLESS = 4_000_000  # training tokens taken from a corpus that never ends
ALPHABET = 257  # tokens of the smallest byte-level BPE: 256 bytes and the end of a text
TRAINED_ON = 10_000_000  # characters on which a BPE is trained
LEAST_TRAINED_ON = 1_000_000  # of these if few tokens are wanted
PER_TOKEN = 10  # characters of each token that is wanted; most tokens have about four
AT_ONCE = 200_000  # characters that are tokenized together
ENDS = (END, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[SEP]")
"""Tokens with which tokenizers mark the end of a document."""

_HELD_OUT = 50  # one document in 50 is for validation
_FILES = ("tokenizer.json", "tokens.bin", "validation.bin")


# ---- tokenizers ----------------------------------------------------------------------------------


class Tokenizer:
    """Converts text to token ids and back.

    Args:
        inner: a tokenizer from the package tokenizers.
    """

    def __init__(self, inner: Any) -> None:
        inner.no_truncation()
        inner.no_padding()
        self.inner = inner
        self._names = dict[int, str]()

    @cached_property
    def size(self) -> int:
        """One more than the largest token id."""
        vocabulary = self.inner.get_vocab(with_added_tokens=True)
        largest = max(vocabulary.values())
        return largest + 1

    @cached_property
    def end(self) -> int | None:
        """The token after a document; None if the tokenizer has none."""
        for name in ENDS:
            token = self.inner.token_to_id(name)
            if token is not None:
                return token
        return None

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, including those that the tokenizer adds around it."""
        return self.inner.encode(text).ids

    def encode_prompt(self, text: str) -> tuple[list[int], list[str]]:
        """Return the tokens of a prompt, and the names of those that were removed as duplicates.

        If the prompt starts with the beginning-of-text token that the tokenizer also adds, only one
        of the two is kept, and likewise at the end. Models never see two of them in training.
        """
        ids = self.encode(text)
        inner_ids = self.inner.encode(text, add_special_tokens=False).ids
        if not inner_ids or len(ids) == len(inner_ids):
            return ids, []
        repeated = list[str]()
        start = _find_last(ids, inner_ids)
        first = inner_ids[0]
        if start and ids[start - 1] == first:
            repeated.append(self.name(first))
            del ids[start]
            inner_ids = inner_ids[1:]
        end = start + len(inner_ids)
        if inner_ids and end < len(ids):
            last = inner_ids[-1]
            if ids[end] == last:
                repeated.append(self.name(last))
                del ids[end]
        return ids, repeated

    def decode(self, ids: list[int]) -> str:
        """Return the text of some tokens."""
        return self.inner.decode(ids, skip_special_tokens=False)

    def name(self, token: int) -> str:
        """Return the label of a token: its text, or `<0xE2>` for a part of a character."""
        if token not in self._names:
            self._names[token] = self._label(token)
        return self._names[token]

    @cached_property
    def _byte_pieces(self) -> dict[str, int]:
        """SentencePiece's tokens for single bytes; empty unless the vocabulary has all 256."""
        pieces = dict[str, int]()
        for byte in range(256):
            piece = f"<0x{byte:02X}>"
            if self.inner.token_to_id(piece) is None:
                return {}
            pieces[piece] = byte
        return pieces

    def _label(self, token: int) -> str:
        piece = self.inner.id_to_token(token)
        if piece is None:
            return f"<{token}>"
        if piece in self._byte_pieces:
            byte = self._byte_pieces[piece]
            content = bytes([byte])
            return labels.token_label(content)
        if piece.startswith("▁"):  # a space; decoding would drop it at the start
            return piece.replace("▁", " ")
        text = self.decode([token])
        content = text.encode()
        is_incomplete = "\ufffd" in text  # it ends or begins within a character
        if is_incomplete and all(letter in _BYTES for letter in piece):
            content = bytes(_BYTES[letter] for letter in piece)
        return labels.token_label(content)


def _find_last(ids: list[int], part: list[int]) -> int:
    """Return the position at which `part` occurs last in `ids`; 0 if it does not occur."""
    length = len(part)
    last = len(ids) - length
    for start in range(last, -1, -1):
        stop = start + length
        if ids[start:stop] == part:
            return start
    return 0


def _byte_letters() -> dict[str, int]:
    """Return the letters with which GPT-2's byte-level BPE writes the 256 bytes.

    Printable characters stand for themselves; the other bytes use letters from 256 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    letters = dict[str, int]()
    next_code = 256
    for byte in range(256):
        if byte in printable:
            letters[chr(byte)] = byte
        else:
            letters[chr(next_code)] = byte
            next_code += 1
    return letters


_BYTES = _byte_letters()


def opened(reference: str) -> Tokenizer:
    """Open a tokenizer by its file, the folder of its tokenizer.json, or its name on the hub.

    The file can be a GGUF file, which contains the tokenizer of its model.

    Raises:
        BadInput: it does not exist, or cannot be read.
    """
    if is_gguf(reference):
        return Tokenizer(tokenizer_in_gguf(reference))
    path = expanded(reference)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.exists():
        path = _fetch(reference)
    tokenizers = library("tokenizers", f"tokenizer '{reference}'")
    try:
        return Tokenizer(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # the package raises no narrower type
        raise BadInput(
            f"tokenizer '{path}': cannot be read ({error}); give a tokenizer.json"
        ) from error


def _fetch(reference: str) -> Path:
    """Return the tokenizer.json of a repository on the hub, downloaded if necessary."""
    names_file = reference.startswith((".", "/", "~")) or reference.endswith(".json")
    if names_file or reference.count("/") > 1:
        raise BadInput(
            f"tokenizer '{reference}': no such tokenizer.json; omit tokenizer to train one on the "
            "corpus"
        )
    hub = library("huggingface_hub", f"tokenizer '{reference}'")
    reachable = hub_answers()
    try:
        with quietly():
            path = hub.hf_hub_download(reference, "tokenizer.json", local_files_only=not reachable)
        return Path(path)
    except Exception as error:  # the hub's client and its dependencies raise errors of many types
        why = "not on this machine, and no network to fetch it"
        if reachable:
            why = " ".join(str(error).split())[:160]
        raise BadInput(
            f"tokenizer '{reference}': {why}; omit tokenizer to train one on the corpus"
        ) from error


def trained(corpus: Corpus, vocab: int, characters: int = TRAINED_ON) -> Tokenizer:
    """Train a byte-level BPE of `vocab` tokens.

    It sees the first `characters` of the documents that are not for validation.
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
    trainer = tokenizers.trainers.BpeTrainer(**options)
    inner.train_from_iterator(_take(texts, characters), trainer)
    return Tokenizer(inner)


def _take(texts: Iterator[str], characters: int) -> Iterator[str]:
    """Yield the first texts, up to a total number of characters."""
    for text in texts:
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return


# ---- streams -------------------------------------------------------------------------------------


def held_out(index: int) -> bool:
    """Return whether the document of this number is for validation.

    One in fifty is. The second document always is, so that small corpora have validation text too.
    """
    if index < 2:
        return index == 1  # the first document is for training
    label = f"held out {index}".encode()
    hashed = hashlib.blake2b(label, digest_size=8)
    key = hashed.digest()
    number = int.from_bytes(key)
    remainder = number % _HELD_OUT
    return remainder == 0


@dataclass(frozen=True)
class Streams:
    """The tokens of a corpus, on disk."""

    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray
    facts: dict[str, Any]
    folder: Path


def tokenized(corpus: Corpus, tokenizer: str | None, vocab: int, max_tokens: int | None) -> Streams:
    """Return the tokens of a corpus, tokenizing it unless that has been done before.

    Other processes that need the same tokens wait.

    Args:
        corpus: the text.
        tokenizer: file, folder or hub name of a tokenizer; None trains one.
        vocab: number of tokens of a trained tokenizer.
        max_tokens: largest number of training tokens; None takes the whole corpus, or four million
            tokens of an endless one.

    Raises:
        BadInput: the corpus or the tokenizer is not available, or the corpus contains no text.
    """
    if tokenizer is None:
        given = None
        tokenizer_key = vocab
    else:
        given = opened(tokenizer)
        tokenizer_key = given.inner.to_str()
    limit = max_tokens
    if limit is None and corpus.endless:
        limit = ENDLESS
    fingerprint = corpus.fingerprint()
    characters = _trained_on(limit)
    facts = [LAYOUT, fingerprint, tokenizer_key, limit]
    if tokenizer is None and characters < TRAINED_ON:
        facts.append(characters)
    key = digest(facts)
    folder = files.root() / "data" / key
    with _locked(folder):
        streams = _read(folder)
        if streams is None:
            used = given or trained(corpus, vocab, characters)
            _make(folder, corpus, used, limit)
            streams = _read(folder)
    assert streams is not None
    return streams


def _trained_on(limit: int | None) -> int:
    """Return the number of characters on which to train a tokenizer for at most `limit` tokens."""
    if limit is None:
        return TRAINED_ON
    wanted = max(LEAST_TRAINED_ON, PER_TOKEN * limit)
    return min(TRAINED_ON, wanted)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(folder: Path) -> Streams | None:
    """Read the streams in a folder; return None if they are incomplete or damaged."""
    try:
        content = (folder / "facts.json").read_bytes()
        facts = json_files.parsed(content, dict[str, Any])
        for name in _FILES:
            if file_digest(folder / name) != facts["digests"][name]:
                return None
        kind = np.dtype(facts["dtype"])
        train = _mapped(folder / "tokens.bin", facts["tokens"], kind)
        validation = _mapped(folder / "validation.bin", facts["validation_tokens"], kind)
        if train is None or validation is None:
            return None
        tokenizer = opened(str(folder / "tokenizer.json"))
        return Streams(tokenizer, train, validation, facts, folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # an unreadable tokenizer raises BadInput, which is a ValueError


def _mapped(path: Path, count: int, kind: np.dtype) -> np.ndarray | None:
    """Return the tokens in a file as an array on disk; None if their number differs."""
    expected_size = count * kind.itemsize
    if path.stat().st_size != expected_size:
        return None
    if count == 0:  # an empty file cannot be mapped
        return np.empty(0, kind)
    return np.memmap(path, kind, "r")


def _make(folder: Path, corpus: Corpus, tokenizer: Tokenizer, limit: int | None) -> None:
    """Tokenize a corpus, and write its folder."""
    for leftover in folder.glob(".*.new"):  # of a process that was killed
        leftover.unlink()
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
                f"corpus '{corpus.name}': it contains no text; give one that contains some"
            )
    facts = {
        "dtype": kind.name,
        "vocab": tokenizer.size,
        "end": tokenizer.end,
        "max_tokens": limit,
        "corpus": asdict(corpus),
        "digests": {name: file_digest(folder / name) for name in _FILES},
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
    """Write both streams; return the numbers of documents and tokens in each."""
    counts = {"documents": 0, "tokens": 0, "validation_documents": 0, "validation_tokens": 0}
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
        for batch in _batches(enumerate(corpus.documents())):
            texts = [text for _, text in batch]
            encodings = tokenizer.inner.encode_batch_fast(texts, add_special_tokens=False)
            for (index, _), encoding in zip(batch, encodings, strict=True):
                ids = [*encoding.ids, *end]
                if held_out(index):
                    prefix, file = "validation_", validation
                else:
                    prefix, file = "", train
                    if limit is not None:
                        ids = ids[: limit - counts["tokens"]]
                file.write(np.array(ids, kind).tobytes())
                counts[f"{prefix}documents"] += 1
                counts[f"{prefix}tokens"] += len(ids)
                if limit is not None and counts["tokens"] >= limit:
                    return counts
            bar.update(counts["tokens"] - bar.n)
    return counts


def _batches(documents: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Group numbered documents into the lists that are tokenized together."""
    for document in documents:
        batch = [document]
        _, text = document
        room = AT_ONCE - len(text)
        while room > 0 and (following := next(documents, None)):
            batch.append(following)
            _, text = following
            room -= len(text)
        yield batch
