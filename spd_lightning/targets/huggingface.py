"""Any causal language model of HuggingFace transformers as a target; modules keep their names.

HuggingFaceLM.from_pretrained("gpt2")  # a hub name, the folder of a checkpoint, or a GGUF file
Decomposition(target="hf:gpt2", sites={"transformer.h.*.mlp.c_fc": 1000})
"""

import importlib
import json
import logging
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd_lightning.errors import BadInput
from spd_lightning.paths import expanded
from spd_lightning.targets import gguf
from spd_lightning.targets.language import LanguageModel, fits

Precision = Literal["float32", "bfloat16", "float16", "float64"]
_CONTEXT = ("max_position_embeddings", "max_seq_len", "seq_length", "n_ctx")
_UNBOUNDED = 2**31 - 1
_PLACE = "pretrained_model_name_or_path"
_NAMES = ("_name_or_path", "_model_name_or_path")
_CONSTANTS = (".attn.bias", ".masked_bias", ".inv_freq", ".position_ids")
"""Masks and tables that old checkpoints contain in addition to their weights."""


class HuggingFaceLM(LanguageModel):
    """A causal language model of HuggingFace transformers, unchanged.

    The modules of the model are registered directly on this module, and keep their names.

    Args:
        config: the model's configuration as plain values, including `model_type`. Weights are
            drawn at random.
        dtype: precision of the weights.

    Examples:
        >>> from spd_lightning import ComponentModel, HuggingFaceLM
        >>> sizes = {"vocab_size": 50, "n_embd": 8, "n_layer": 2, "n_head": 2}
        >>> target = HuggingFaceLM({"model_type": "gpt2", **sizes})
        >>> ComponentModel(target, sites={"transformer.h.*.mlp.c_fc": 30}).counts
        {'transformer.h.0.mlp.c_fc': 30, 'transformer.h.1.mlp.c_fc': 30}
    """

    def __init__(self, config: dict[str, Any], dtype: Precision = "float32") -> None:
        super().__init__()
        auto = library("a HuggingFaceLM")
        try:
            with quietly():
                settings = auto.AutoConfig.for_model(**config)
                model = auto.AutoModelForCausalLM.from_config(
                    settings, dtype=getattr(torch, dtype), trust_remote_code=False
                )
        except Exception as error:  # transformers raises errors of many types
            raise BadInput(
                f"config in HuggingFaceLM: {_line(error)}; take it from a causal language model"
            ) from error
        self._adopt(model)

    @classmethod
    def from_pretrained(cls, reference: str, dtype: Precision | None = None) -> "HuggingFaceLM":
        """Load a checkpoint as a target.

        Args:
            reference: the checkpoint's folder, its GGUF file, or its name on the hub.
            dtype: precision of the weights; if omitted, bfloat16 if a CUDA device is available,
                float32 otherwise.

        Raises:
            BadInput: the causal language model does not exist, or cannot be fetched.
        """
        if dtype is None:
            dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        target = cls.__new__(cls)
        super(HuggingFaceLM, target).__init__()
        target._adopt(checkpoint(reference, dtype))
        return target

    def _adopt(self, model: Any) -> None:
        """Register the modules of a model on this one."""
        # inside a tuple the model is not a submodule, whose name would prefix all others
        self._model = (model.eval(),)
        self._parameters = model._parameters
        self._buffers = model._buffers
        self._modules = model._modules
        config = json.loads(model.config.to_json_string(use_diff=False))
        for name in _NAMES:
            config.pop(name, None)
        config["tie_word_embeddings"] = is_tied(model)  # the original configuration can be wrong
        dtype = str(model.dtype).removeprefix("torch.")
        self.init_args = {"config": config, "dtype": dtype}
        text_config = model.config.get_text_config()
        self.vocab = int(text_config.vocab_size)
        self.context = _context_of(text_config)

    @property
    def model(self) -> Any:
        """The model as transformers built it."""
        return self._model[0]

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        """Return the logits of the next token at every position.

        Raises:
            BadInput: the sequence is longer than the context.
        """
        length = tokens.shape[1]
        fits(length, self.context, "HuggingFaceLM")
        output = self.model(input_ids=tokens, use_cache=False)
        return output.logits


def _context_of(text_config: Any) -> int:
    """Return the largest number of positions that a configuration allows."""
    for name in _CONTEXT:
        if length := getattr(text_config, name, None):
            return int(length)
    return _UNBOUNDED


def is_tied(model: Any) -> bool:
    """Return whether embedding and unembedding of a model of transformers are one parameter."""
    first = model.get_input_embeddings()
    last = model.get_output_embeddings()
    if first is None or last is None:
        return False
    return first.weight is last.weight


# ---- checkpoints ---------------------------------------------------------------------------------


def checkpoint(reference: str, dtype: Precision) -> Any:
    """Load a causal language model of transformers from a folder, a GGUF file or the hub.

    Raises:
        BadInput: the model does not exist, its weights do not match its configuration, or the hub
            is not reachable.
    """
    options = {
        "dtype": getattr(torch, dtype),
        "output_loading_info": True,
        "trust_remote_code": False,
    }
    auto = library(f"'{reference}'").AutoModelForCausalLM
    reject_adapter(reference)
    model, report = _load(reference, lambda place: auto.from_pretrained(**place, **options))
    if gguf.is_gguf(reference):
        gguf.check_complete(reference, model)
        del model.config.quantization_config  # the weights are not quantized any more
    # for an adapter on the hub, transformers loads the base model and applies the adapter to it
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _adapter(reference, str(model.config.name_or_path))
    mismatched = [name for name, *_ in report["mismatched_keys"]]
    if missing := sorted([*report["missing_keys"], *mismatched]):
        raise BadInput(
            f"model '{reference}': its checkpoint has no fitting '{missing[0]}'; give a causal "
            "language model"
        )
    unexpected = report["unexpected_keys"]
    if unused := sorted(name for name in unexpected if not name.endswith(_CONSTANTS)):
        raise BadInput(
            f"model '{reference}': its checkpoint holds '{unused[0]}', which the model that its "
            "config.json describes does not have; correct config.json, or remove the weight from "
            "the checkpoint if it is not needed"
        )
    return model


def reject_adapter(reference: str) -> None:
    """Raise BadInput if a folder holds a LoRA adapter and not a model."""
    path = expanded(reference) / "adapter_config.json"
    if not path.is_file():
        return
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    raise _adapter(reference, str(base or "its base model"))


def _adapter(reference: str, base: str) -> BadInput:
    return BadInput(
        f"model '{reference}': it is an adapter of {base}, and not a model; merge the adapter "
        f"first, with peft: AutoPeftModelForCausalLM.from_pretrained('{reference}')"
        ".merge_and_unload().save_pretrained(FOLDER), and give FOLDER"
    )


def configuration(reference: str) -> Any:
    """Load the configuration of a causal language model of transformers, without its weights.

    Raises:
        BadInput: the model does not exist, or the hub is not reachable.
    """
    reject_adapter(reference)
    auto = library(f"'{reference}'").AutoConfig

    def load(place: Mapping[str, str]) -> Any:
        return auto.from_pretrained(**place, trust_remote_code=False)

    return _load(reference, load)


def _load(reference: str, load: Callable[[Mapping[str, str]], Any]) -> Any:
    """Apply `load` to the arguments of transformers that name a checkpoint.

    Raises:
        BadInput: the checkpoint does not exist, or `load` fails.
    """
    if gguf.is_gguf(reference):
        return _load_gguf(reference, load)
    folder = expanded(reference)
    local = folder.is_dir()
    names_folder = folder.is_absolute() or reference.startswith((".", "~"))
    if not local and (names_folder or reference.count("/") > 1):
        raise BadInput(
            f"model '{reference}': no such folder; give the folder of a checkpoint, or a name on "
            "the hub"
        )
    try:
        with quietly():
            if local:
                place = str(folder)
            elif hub_answers():
                place = reference
            else:
                place = _cached_folder(reference)
            return load({_PLACE: place})
    # transformers, the hub's client, safetensors and their dependencies raise errors of many types
    except Exception as error:
        raise BadInput(_unavailable(reference, local, error)) from error


def _load_gguf(reference: str, load: Callable[[Mapping[str, str]], Any]) -> Any:
    with gguf.arguments(reference) as place:
        try:
            with quietly(), redirect_stderr(StringIO()):  # it always shows a progress bar
                return load(place)
        except Exception as error:  # transformers and gguf raise errors of many types
            raise BadInput(
                f"model '{reference}': cannot be read as GGUF ({_line(error)}); give a whole file "
                "of a causal language model that transformers supports"
            ) from error


def tokenizer_in_gguf(reference: str) -> Any:
    """Load the tokenizer in a GGUF file, as one of the package tokenizers.

    Raises:
        BadInput: the file does not exist, or contains no tokenizer that transformers supports.
    """
    auto = library(f"'{reference}'").AutoTokenizer

    def load(place: Mapping[str, str]) -> Any:
        return auto.from_pretrained(**place, trust_remote_code=False).backend_tokenizer

    return _load_gguf(reference, load)


def hub_answers() -> bool:
    """Return whether the address of the hub can be resolved.

    Without a network, the hub's own client takes most of a minute to find out.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():  # the proxy resolves the address
        return True
    host = urlsplit(constants.ENDPOINT).hostname
    try:
        return bool(socket.getaddrinfo(host, 443))
    except OSError:
        return False


def _cached_folder(reference: str) -> str:
    """Return the folder in which the hub's client has cached a model."""
    from huggingface_hub import snapshot_download

    return snapshot_download(reference, local_files_only=True)


def _unavailable(reference: str, local: bool, error: Exception) -> str:
    if local:
        return (
            f"model '{reference}': cannot be loaded ({_line(error)}); give the folder of a causal "
            "language model"
        )
    why = "not on this machine, and no network to fetch it"
    if hub_answers():
        why = _line(error)
    return f"model '{reference}': {why}; stories-2L.yaml and code-2L.yaml need no network"


def _line(error: Exception) -> str:
    """Return the message of an error on one line, shortened."""
    words = str(error).split()
    message = " ".join(words)
    if not message:
        return type(error).__name__
    return message[:160]


def library(what: str) -> Any:
    """Import and return the package transformers, which comes with the extra [lm].

    Args:
        what: the value that needs it, for the message.

    Raises:
        BadInput: it is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        remedy = "pip install 'spd_lightning[lm]' (in a checkout: pip install -e '.[lm]')"
        raise BadInput(f"{what}: needs transformers; {remedy}") from error


@contextmanager
def quietly() -> Iterator[None]:
    """Suppress the progress bars, log messages and warnings of transformers in a `with` block."""
    settings = library("a checkpoint").utils.logging
    hub_log = logging.getLogger("huggingface_hub")
    verbosity = settings.get_verbosity()
    hub_level = hub_log.level
    bars = settings.is_progress_bar_enabled()
    settings.set_verbosity(logging.CRITICAL)
    hub_log.setLevel(logging.CRITICAL)
    settings.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        settings.set_verbosity(verbosity)
        hub_log.setLevel(hub_level)
        if bars:
            settings.enable_progress_bar()
