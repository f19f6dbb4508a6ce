"""Text as a LightningDataModule: windows of a corpus's tokens to train on, prompts to look at.

A stream of tokens is cut into consecutive windows that do not overlap. Rows of batches go through
the windows in an order that is drawn again for every epoch. Row r of epoch e is a pure function of
(seed, e, r), and the batches of one step on all devices together are consecutive rows. So one
device with batch 2B sees the same rows as two with batch B.
"""

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from spd_lightning.data.corpora import Corpus, Unusable
from spd_lightning.data.modules import Prompts, StepData, generator_for
from spd_lightning.data.prompt_texts import PromptText, given_texts, rejection, texts_in_file
from spd_lightning.data.tokenized import ALPHABET, Streams, Tokenizer, opened, tokenized
from spd_lightning.encoding import lone_surrogate
from spd_lightning.errors import BadInput, check_range

log = logging.getLogger(__name__)


class Text(StepData):
    """Token windows of a corpus, and prompts, by any tokenizer or one trained on the corpus."""

    def __init__(
        self,
        corpus: str = "stories",
        column: str = "text",
        split: str = "train",
        config_name: str | None = None,
        streaming: bool = False,
        max_tokens: int | None = None,
        tokenizer: str | None = None,
        vocab: int = 1000,
        seq_len: int = 64,
        batch_size: int = 64,
        seed: int = 0,
        validation_batches: int = 4,
        validation_batch_size: int | None = None,
        prompts: Sequence[str] = (),
        prompts_file: str | None = None,
        prompts_column: str = "text",
        too_long: Literal["error", "skip", "truncate"] = "error",
        n_prompts: int = 64,
        n_ctx: int | None = None,
        predict_batch_size: int = 64,
    ) -> None:
        """Args: corpus: `stories` or `stdlib` (on every machine), a path or glob of .txt, .jsonl
        or .parquet files, or `hf:NAME`, a HuggingFace dataset. column: the column that holds the
        text, of .jsonl, .parquet and datasets. split: the split of a dataset. config_name: the
        configuration of a dataset that has several. streaming: read a dataset as it arrives rather
        than download it first. max_tokens: training tokens to take of the corpus; all if omitted,
        of the endless stories 4 million. tokenizer: a tokenizer.json, the folder that holds it, or
        a hub name; left out, a byte-level BPE is trained. vocab: tokens of a tokenizer that is
        trained; at least 257. seq_len: tokens in a window. batch_size: windows in a batch, on each
        device. seed: chooses the order of the windows, not the corpus. validation_batches: how many
        batches each device validates on. validation_batch_size: windows in such a batch; batch_size
        if omitted. prompts: texts that `predict` runs on. prompts_file: more of them: a text file
        with one a line, or a .jsonl or .parquet file; blank lines are skipped. prompts_column: the
        column of a .jsonl or .parquet file that holds the prompts. too_long: what to do with given
        prompts that have more tokens than the target's context holds: stop with an error, skip
        them, or truncate them to their first tokens. n_prompts: where neither is given, how many
        windows of validation text `predict` runs on. n_ctx: tokens of such a window; seq_len if
        omitted. predict_batch_size: prompts in a batch of `predict`.
        """
        super().__init__(batch_size, seed, validation_batches, predict_batch_size)
        self.corpus = Corpus(corpus, column, split, config_name, streaming)
        self.max_tokens = max_tokens
        self.tokenizer_name = tokenizer
        self.vocab = vocab
        self.seq_len = seq_len
        self.validation_batch_size = (
            batch_size if validation_batch_size is None else validation_batch_size
        )
        self.given = [prompts] if isinstance(prompts, str) else list(prompts)
        self.prompts_file, self.prompts_column = prompts_file, prompts_column
        self.too_long, self.n_prompts = too_long, n_prompts
        self._said = set[str]()
        self.n_ctx = seq_len if n_ctx is None else n_ctx
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Reject sizes that are too small for windows of text."""
        least = {
            "seq_len": 2,
            "validation_batch_size": 1,
            "n_prompts": 0,
            "n_ctx": 1,
            "max_tokens": 1,
        }
        least |= {"vocab": ALPHABET} if self.tokenizer_name is None else {}
        for name, bound in least.items():
            check_range("Text", least=bound, whole=True, **{name: getattr(self, name)})

    # ---- tokens ----------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Tokenizes the corpus unless that has been done."""
        assert self.streams

    @cached_property
    def streams(self) -> Streams:
        """The corpus's tokens.

        Raises:
            BadInput: the corpus or the tokenizer cannot be had.
        """
        return tokenized(self.corpus, self.tokenizer_name, self.vocab, self.max_tokens)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; a corpus is touched only where it has to be trained."""
        return (
            self.streams.tokenizer if self.tokenizer_name is None else opened(self.tokenizer_name)
        )

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return self.tokenizer.size

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with those that the tokenizer itself puts around one; none of these
        stands twice.

        Raises:
            BadInput: there is half of a character in it, as a terminal gives it that is not in
                UTF-8.
        """
        if half := lone_surrogate(text):
            raise BadInput(
                f"text '{text[:40]}': {half} is half of a character; write it in UTF-8, whole"
            )
        ids, repeated = self.tokenizer.encode_prompt(text)
        for name in repeated:
            self._say(
                "the text already contains '%s', which the tokenizer also adds; only one is kept",
                name,
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens."""
        return self.tokenizer.decode(list(ids))

    def names(self, ids: Sequence[int]) -> list[str]:
        """Each token's text; spaces and line ends stand as they are, parts of a character as
        `<0xE2>`.
        """
        return [self.tokenizer.name(i) for i in ids]

    # ---- windows ---------------------------------------------------------------------------------

    def batch(
        self, step: int, rank: int = 0, split: str = "train", world: int = 1
    ) -> Int[Tensor, "batch pos"]:
        """The windows of one step on one of `world` devices, the same whenever and wherever they
        are asked for.

        Raises:
            BadInput: the corpus cannot be had, or is shorter than a window.
        """
        rows = self.validation_batch_size if split == "val" else self.batch_size
        windows = self._windows(split, self.seq_len)
        first = (step * world + rank) * rows
        chosen = [self._window(split, row, len(windows)) for row in range(first, first + rows)]
        return torch.from_numpy(windows[chosen].astype(np.int64))

    def _window(self, split: str, row: int, count: int) -> int:
        epoch, place = divmod(row, count)
        return int(_order(self.seed, split, epoch, count)[place])

    def _windows(self, split: str, length: int) -> np.ndarray:
        """All windows of a split [windows, length], as a view of the stream."""
        stream = self.streams.train if split == "train" else self.streams.validation
        if len(stream) < length:
            part, remedy = (
                ("training", "more text") if split == "train" else ("validation", "more documents")
            )
            raise BadInput(
                f"corpus '{self.corpus.name}' in Text: {len(stream)} {part} tokens, and a window "
                f"needs {length}; "
                f"give it {remedy}, or make seq_len and n_ctx smaller"
            )
        return stream[: len(stream) // length * length].reshape(-1, length)

    # ---- prompts ---------------------------------------------------------------------------------

    def groups(self) -> list[Prompts]:
        """All that `predict` runs on, by length: the texts given, or else windows of validation
        text.

        Raises:
            BadInput: a prompt cannot be used, or the file cannot be read.
        """
        found: dict[int, list[tuple[str, str, list[int]]]] = {}
        for source, ids in self._prompts():
            split = "validation" if source.startswith("validation") else "given"
            found.setdefault(len(ids), []).append((source, split, ids))
        return [self._group(*zip(*group, strict=True)) for group in found.values()]

    def _group(
        self, sources: Sequence[str], splits: Sequence[str], ids: Sequence[list[int]]
    ) -> Prompts:
        return Prompts(
            torch.tensor(ids), list(sources), list(splits), [self.names(row) for row in ids]
        )

    def _prompts(self) -> Iterator[tuple[str, list[int]]]:
        """Every prompt's source and tokens."""
        if self.given or self.prompts_file is not None:
            yield from self._fitting(self._texts())
            return
        if not self.n_prompts:
            return
        windows = self._windows("val", self.n_ctx)
        if len(windows) < self.n_prompts:
            log.warning(
                "n_prompts %d in Text: the validation text has %d windows",
                self.n_prompts,
                len(windows),
            )
        for index in _order(self.seed, "predict", 0, len(windows))[: self.n_prompts]:
            yield f"validation {index}", windows[index].tolist()

    def _texts(self) -> list[PromptText]:
        """The prompts of the list and of the file."""
        found = given_texts(self.given)
        if self.prompts_file is not None:
            path = Path(self.prompts_file).expanduser()
            in_file, blank = texts_in_file(path, self.prompts_column)
            found += in_file
            if blank:
                self._say(
                    "prompts_file '%s' in Text: %s skipped",
                    path,
                    _count(blank, "blank line was", "blank lines were"),
                )
        return found

    def _fitting(self, texts: Sequence[PromptText]) -> list[tuple[str, list[int]]]:
        """Source and tokens of prompts, with a line on what had to be changed.

        Raises:
            BadInput: some cannot be used; the message names all of them.
        """
        context = self._context()
        found = list[tuple[str, list[int]]]()
        offenses = dict[str, Unusable]()
        long = 0
        repeated = list[str]()
        for source, place, text in texts:
            if isinstance(text, Unusable):
                offenses[place] = text
                continue
            ids, twice = self.tokenizer.encode_prompt(text)
            repeated += twice
            if not ids:
                offenses[place] = Unusable("it is empty", "give it a text or leave it out")
                continue
            if context is None or len(ids) <= context:
                found.append((source, ids))
                continue
            long += 1
            if self.too_long == "error":
                why = f"{len(ids)} tokens, and the target's context holds {context}"
                offenses[place] = Unusable(why, "shorten it, or set too_long to skip or truncate")
            elif self.too_long == "truncate":
                found.append((source, ids[:context]))
        if offenses:
            raise rejection(offenses)
        if long:
            done = "truncated to" if self.too_long == "truncate" else "skipped for having more than"
            which = _count(long, "prompt was", "prompts were")
            self._say(
                "too_long in Text: %s %s the %d tokens that the target's context holds",
                which,
                done,
                context,
            )
        if not found:
            raise BadInput(
                "prompts in Text: none is left; give shorter ones, or set too_long to truncate"
            )
        for name in dict.fromkeys(repeated):
            which = _count(repeated.count(name), "prompt brings", "prompts bring")
            self._say(
                "%s '%s', which the tokenizer adds itself; one of the two is kept", which, name
            )
        return found

    def _context(self) -> int | None:
        """How many tokens the trainer's model takes; None where there is no trainer, or no such
        limit.
        """
        module = None if self.trainer is None else self.trainer.lightning_module
        return getattr(getattr(module, "network", None), "context", None)

    def _say(self, line: str, *values: object) -> None:
        """Logs a line once, however often the prompts are read."""
        said = line % values
        if said not in self._said:
            self._said.add(said)
            log.warning("%s", said)


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


@lru_cache(maxsize=4)
def _order(seed: int, split: str, epoch: int, count: int) -> np.ndarray:
    """A permutation of that many windows."""
    return torch.randperm(
        count, generator=generator_for(seed, f"{split} windows", epoch, 0)
    ).numpy()
