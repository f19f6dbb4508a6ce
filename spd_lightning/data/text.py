"""Text as a LightningDataModule: token windows for training, and prompts for analysis.

A stream of tokens is cut into consecutive windows that do not overlap. The rows of batches are the
windows in a random order, which is drawn again for every epoch. Row r of epoch e is a pure function
of (seed, e, r). The batches of one step on all devices are consecutive rows, so one device with
batch size 2B sees the same rows as two devices with batch size B.
"""

import logging
from collections.abc import Sequence
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
from spd_lightning.targets.protocols import HasContext, HasNetwork

log = logging.getLogger(__name__)


class Text(StepData):
    """Token windows of a corpus, and prompts, from any tokenizer or one trained on the corpus.

    Examples:
        >>> from pathlib import Path
        >>> from spd_lightning import Text
        >>> _ = Path("corpus.txt").write_text("The cat sat on the mat. " * 500)
        >>> data = Text("corpus.txt", vocab=270, seq_len=16, batch_size=4)
        >>> data.batch(step=0).shape
        torch.Size([4, 16])
        >>> data.names(data.encode("The mat sat."))
        ['The', ' mat', ' sat', '.']
    """

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
        """
        Args:
            corpus: `stories` or `stdlib` (available on every machine), a path or glob of .txt,
                .jsonl or .parquet files (`package:NAME/FILE` for a file of an installed package),
                or `hf:NAME` for a HuggingFace dataset.
            column: the text column of .jsonl files, .parquet files and datasets.
            split: the split of a dataset.
            config_name: the configuration of a dataset that has several.
            streaming: read a dataset as it arrives rather than download it first.
            max_tokens: largest number of training tokens; if omitted, all tokens of the corpus, or
                4 million of the endless stories.
            tokenizer: a tokenizer.json, its folder, a GGUF file, or a name on the hub; if omitted,
                a byte-level BPE is trained on the corpus.
            vocab: number of tokens of a trained tokenizer; at least 257.
            seq_len: tokens per window.
            batch_size: windows per batch on each device.
            seed: determines the order of the windows, but not the corpus.
            validation_batches: number of batches on which each device validates.
            validation_batch_size: windows per validation batch; batch_size if omitted.
            prompts: texts for `predict`.
            prompts_file: a file with more prompts: a text file with one per line, or a .jsonl or
                .parquet file; blank lines are skipped.
            prompts_column: the column of a .jsonl or .parquet file that contains the prompts.
            too_long: what to do with prompts that are longer than the target's context: stop with
                an error, skip them, or truncate them to their first tokens.
            n_prompts: number of windows for `predict`, if neither prompts nor prompts_file is
                given: of validation text, then of training text.
            n_ctx: tokens per such window; seq_len if omitted.
            predict_batch_size: prompts per batch of `predict`.
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
        self.prompts_file = prompts_file
        self.prompts_column = prompts_column
        self.too_long = too_long
        self.n_prompts = n_prompts
        self._logged = set[str]()
        self.n_ctx = seq_len if n_ctx is None else n_ctx
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Reject sizes that are too small for windows of text."""
        bounds = {
            "seq_len": 2,
            "validation_batch_size": 1,
            "n_prompts": 0,
            "n_ctx": 1,
            "max_tokens": 1,
        }
        if self.tokenizer_name is None:
            bounds["vocab"] = ALPHABET
        for name, bound in bounds.items():
            check_range("Text", least=bound, whole=True, **{name: getattr(self, name)})

    # ---- tokens ----------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Tokenize the corpus unless that has been done before."""
        assert self.streams

    @cached_property
    def streams(self) -> Streams:
        """The tokens of the corpus.

        Raises:
            BadInput: the corpus or the tokenizer is not available.
        """
        return tokenized(self.corpus, self.tokenizer_name, self.vocab, self.max_tokens)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; the corpus is only read if the tokenizer is trained on it."""
        if self.tokenizer_name is None:
            return self.streams.tokenizer
        return opened(self.tokenizer_name)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return self.tokenizer.size

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, including those that the tokenizer adds around it.

        A token that both the text and the tokenizer add occurs once.

        Raises:
            BadInput: the text contains half of a character, as from a terminal that is not in
                UTF-8.
        """
        if half := lone_surrogate(text):
            raise BadInput(
                f"text '{text[:40]}': {half} is half of a character; write the whole character in "
                "UTF-8"
            )
        ids, repeated = self.tokenizer.encode_prompt(text)
        for name in repeated:
            self._warn_once(
                "the text already contains '%s', which the tokenizer also adds; only one is kept",
                name,
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some tokens."""
        return self.tokenizer.decode(list(ids))

    def names(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token; a part of a character becomes, for example, `<0xE2>`.

        Spaces and line ends are not escaped.
        """
        tokenizer = self.tokenizer
        return [tokenizer.name(i) for i in ids]

    # ---- windows ---------------------------------------------------------------------------------

    def batch(
        self, step: int, rank: int = 0, split: str = "train", world: int = 1
    ) -> Int[Tensor, "batch pos"]:
        """Return the windows of one step on one of `world` devices, a function of these arguments.

        Raises:
            BadInput: the corpus is not available, or is shorter than a window.
        """
        size = self.batch_size
        if split == "val":
            size = self.validation_batch_size
        windows = self._windows(split, self.seq_len)
        count = len(windows)
        earlier_batches = step * world + rank  # each step has one batch on each device
        first = earlier_batches * size
        last = first + size
        numbers = [self._window(split, row, count) for row in range(first, last)]
        tokens = windows[numbers]
        return torch.from_numpy(tokens.astype(np.int64))

    def _window(self, split: str, row: int, count: int) -> int:
        """Return the number of the window at a row, which counts through all epochs."""
        epoch, place = divmod(row, count)
        order = _order(self.seed, split, epoch, count)
        return int(order[place])

    def _windows(self, split: str, length: int) -> np.ndarray:
        """Return all windows of a split [windows, length], as a view of the stream."""
        stream = self.streams.train
        part = "training"
        remedy = "more text"
        if split != "train":
            stream = self.streams.validation
            part = "validation"
            remedy = "more documents"
        if len(stream) < length:
            raise BadInput(
                f"corpus '{self.corpus.name}' in Text: {len(stream)} {part} tokens, and a window "
                f"needs {length}; give it {remedy}, or make seq_len and n_ctx smaller"
            )
        count = len(stream) // length
        used = stream[: count * length]  # without an incomplete window at the end
        return used.reshape(count, length)

    # ---- prompts ---------------------------------------------------------------------------------

    def groups(self) -> list[Prompts]:
        """Return all prompts of `predict`, grouped by length.

        They are the given texts or, if there are none, windows of validation text.

        Raises:
            BadInput: a prompt cannot be used, or the file cannot be read.
        """
        if not self.given and self.prompts_file is None:
            return self._window_prompts()
        by_length: dict[int, list[tuple[str, list[int]]]] = {}
        for source, ids in self._fitting(self._texts()):
            group = by_length.setdefault(len(ids), [])
            group.append((source, ids))
        return [self._group(prompts) for prompts in by_length.values()]

    def _group(self, prompts: Sequence[tuple[str, list[int]]]) -> Prompts:
        """Join prompts of one length, given as their sources and tokens."""
        sources: list[str] = []
        rows: list[list[int]] = []
        names: list[list[str]] = []
        for source, ids in prompts:
            sources.append(source)
            rows.append(ids)
            names.append(self.names(ids))
        inputs = torch.tensor(rows)
        return Prompts(inputs, sources, ["given"] * len(rows), names)

    def _window_prompts(self) -> list[Prompts]:
        """Return `n_prompts` windows of the corpus, in random order, as one group.

        They are windows of validation text, and of training text if there are too few. There can be
        a million of them, so their tokens get their texts later, batch by batch.
        """
        tokens = []
        sources = list[str]()
        splits = list[str]()
        for split, part in (("val", "validation"), ("train", "training")):
            missing = self.n_prompts - len(sources)
            if not missing:
                break
            windows = self._windows(split, self.n_ctx)
            seed_name = "predict" if split == "val" else "predict training"
            chosen = _order(self.seed, seed_name, 0, len(windows))[:missing]
            tokens.append(windows[chosen].astype(np.int64))
            sources += [f"{part} {index}" for index in chosen]
            splits += [part] * len(chosen)
        if not sources:
            return []
        self._report_parts(splits)
        inputs = torch.from_numpy(np.concatenate(tokens))
        return [Prompts(inputs, sources, splits)]

    def _report_parts(self, splits: Sequence[str]) -> None:
        """Log how many windows are not of validation text, and how many are missing."""
        training = splits.count("training")
        if training:
            self._warn_once(
                "n_prompts %d in Text: the validation text has %d windows; %d are of training text",
                self.n_prompts,
                splits.count("validation"),
                training,
            )
        if len(splits) < self.n_prompts:
            self._warn_once(
                "n_prompts %d in Text: the corpus has only %d windows", self.n_prompts, len(splits)
            )

    def _texts(self) -> list[PromptText]:
        """Return the prompts of the list and of the file."""
        texts = given_texts(self.given)
        if self.prompts_file is None:
            return texts
        path = Path(self.prompts_file).expanduser()
        in_file, blank = texts_in_file(path, self.prompts_column)
        if blank:
            lines = _count(blank, "blank line was", "blank lines were")
            self._warn_once("prompts_file '%s' in Text: %s skipped", path, lines)
        return texts + in_file

    def _fitting(self, texts: Sequence[PromptText]) -> list[tuple[str, list[int]]]:
        """Return the sources and tokens of the prompts that fit the context; log every change.

        Raises:
            BadInput: some prompts cannot be used; the message names them.
        """
        context = self._context()
        prompts = list[tuple[str, list[int]]]()
        offenses = dict[str, Unusable]()
        repeated = list[str]()
        long = 0
        for source, place, text in texts:
            if isinstance(text, Unusable):
                offenses[place] = text
                continue
            ids, names = self.tokenizer.encode_prompt(text)
            repeated += names
            if not ids:
                offenses[place] = Unusable("it is empty", "give it a text or leave it out")
                continue
            if context is None or len(ids) <= context:
                prompts.append((source, ids))
                continue
            long += 1
            if self.too_long == "error":
                why = f"{len(ids)} tokens, and the target's context holds {context}"
                offenses[place] = Unusable(why, "shorten it, or set too_long to skip or truncate")
            elif self.too_long == "truncate":
                prompts.append((source, ids[:context]))
        if offenses:
            raise rejection(offenses)
        if long:
            self._warn_of_long(long, context)
        if not prompts:
            raise BadInput(
                "prompts in Text: none is left; give shorter ones, or set too_long to truncate"
            )
        for name in dict.fromkeys(repeated):
            which = _count(repeated.count(name), "prompt contains", "prompts contain")
            self._warn_once(
                "%s '%s', which the tokenizer also adds; only one of the two is kept", which, name
            )
        return prompts

    def _warn_of_long(self, long: int, context: int | None) -> None:
        """Log the number of prompts that were longer than the context."""
        change = "skipped for having more than"
        if self.too_long == "truncate":
            change = "truncated to"
        which = _count(long, "prompt was", "prompts were")
        self._warn_once(
            "too_long in Text: %s %s the %d tokens that the target's context holds",
            which,
            change,
            context,
        )

    def _context(self) -> int | None:
        """Return the context of the trainer's model; None without a trainer or a limit."""
        if self.trainer is None:
            return None
        module = self.trainer.lightning_module
        if isinstance(module, HasNetwork) and isinstance(module.network, HasContext):
            return module.network.context
        return None

    def _warn_once(self, message: str, *values: object) -> None:
        """Log a warning unless it has been logged before: prompts can be read several times."""
        line = message % values
        if line not in self._logged:
            self._logged.add(line)
            log.warning("%s", line)


def _count(number: int, one: str, many: str) -> str:
    phrase = one if number == 1 else many
    return f"{number} {phrase}"


@lru_cache(maxsize=4)
def _order(seed: int, split: str, epoch: int, count: int) -> np.ndarray:
    """Return the order of the windows in an epoch, a permutation of `count` numbers."""
    generator = generator_for(seed, f"{split} windows", epoch, 0)
    order = torch.randperm(count, generator=generator)
    return order.numpy()
