"""Any causal language model of HuggingFace transformers as a target, its modules under their own
names.

HuggingFaceLM.from_pretrained("gpt2")              # a hub name, or the folder of a checkpoint
Decomposition(target="hf:gpt2", sites={"transformer.h.*.mlp.c_fc": 1000})
"""

import importlib
import json
import logging
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd_lightning.errors import BadInput
from spd_lightning.targets.language import LanguageModel, fits

Precision = Literal["float32", "bfloat16", "float16", "float64"]
_CONTEXT = ("max_position_embeddings", "max_seq_len", "seq_length", "n_ctx")
_UNBOUNDED = 2**31 - 1
_CONSTANTS = (".attn.bias", ".masked_bias", ".inv_freq", ".position_ids")
"""Masks and tables that old checkpoints hold beside their weights."""


class HuggingFaceLM(LanguageModel):
    """A causal language model of HuggingFace transformers, as it is: its modules keep their names.

    The model itself stays outside the tree of modules; its parts are the parts of this one.

    Args:
        config: the model's configuration as plain values, `model_type` among them. Weights are
            drawn at random.
        dtype: what its weights are held in.
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
        except Exception as error:  # of transformers, for a configuration that may be a stranger's
            raise BadInput(
                f"config in HuggingFaceLM: {_line(error)}; take it from a causal language model"
            ) from error
        self._adopt(model)

    @classmethod
    def from_pretrained(cls, reference: str, dtype: Precision | None = None) -> "HuggingFaceLM":
        """A checkpoint as a target.

        Args:
            reference: the checkpoint's folder, or its name on the hub.
            dtype: what its weights are held in; bfloat16 where there is a CUDA device, else
                float32, if left out.

        Raises:
            BadInput: there is no such causal language model, or it cannot be fetched.
        """
        own = cls.__new__(cls)
        super(HuggingFaceLM, own).__init__()
        own._adopt(
            checkpoint(reference, dtype or ("bfloat16" if torch.cuda.is_available() else "float32"))
        )
        return own

    def _adopt(self, model: Any) -> None:
        self._model = (
            model.eval(),
        )  # a tuple keeps the model from being a module of this one, and adding to names
        self._parameters = model._parameters
        self._buffers = model._buffers
        self._modules = model._modules
        config = json.loads(model.config.to_json_string(use_diff=False))
        config.pop("_name_or_path", None)
        config["tie_word_embeddings"] = is_tied(
            model
        )  # by the weights: a configuration may say otherwise
        self.init_args = {"config": config, "dtype": str(model.dtype).removeprefix("torch.")}
        text = model.config.get_text_config()
        self.vocab = int(text.vocab_size)
        self.context = int(
            next((n for n in (getattr(text, name, None) for name in _CONTEXT) if n), _UNBOUNDED)
        )

    @property
    def model(self) -> Any:
        """The model of transformers."""
        return self._model[0]

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        """The logits of the next token at every position.

        Raises:
            BadInput: the sequence is longer than the context.
        """
        fits(tokens.shape[1], self.context, "HuggingFaceLM")
        return self.model(input_ids=tokens, use_cache=False).logits


def is_tied(model: Any) -> bool:
    """Whether a model of transformers has one parameter for its embedding and its unembedding."""
    first = model.get_input_embeddings()
    last = model.get_output_embeddings()
    return first is not None and last is not None and first.weight is last.weight


# ---- checkpoints ---------------------------------------------------------------------------------


def checkpoint(reference: str, dtype: Precision) -> Any:
    """A causal language model of transformers with its weights, from a folder or from the hub.

    Raises:
        BadInput: there is none, its weights do not belong to its configuration, or the hub is out
            of reach.
    """
    options = {
        "dtype": getattr(torch, dtype),
        "output_loading_info": True,
        "trust_remote_code": False,
    }
    auto = library(f"'{reference}'").AutoModelForCausalLM
    refuse_adapter(reference)
    model, found = _taken(reference, lambda place: auto.from_pretrained(place, **options))
    if getattr(
        model, "_hf_peft_config_loaded", False
    ):  # of the hub: transformers loads its base and lays it over
        raise _adapter(reference, str(model.config.name_or_path))
    if lacking := sorted(
        [*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])]
    ):
        raise BadInput(
            f"model '{reference}': its checkpoint has no fitting '{lacking[0]}'; take a causal "
            "language model"
        )
    if unused := sorted(name for name in found["unexpected_keys"] if not name.endswith(_CONSTANTS)):
        raise BadInput(
            f"model '{reference}': its checkpoint holds '{unused[0]}', which the model that its "
            "config.json describes "
            "does not have; correct config.json, or take the weight out of the checkpoint if it is "
            "not needed"
        )
    return model


def refuse_adapter(reference: str) -> None:
    """Raise BadInput if a folder holds a LoRA adapter and not a model."""
    path = Path(reference).expanduser() / "adapter_config.json"
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
        "first, with peft: "
        f"AutoPeftModelForCausalLM.from_pretrained('{reference}')"
        ".merge_and_unload().save_pretrained(FOLDER), "
        "and take FOLDER"
    )


def configuration(reference: str) -> Any:
    """The configuration of a causal language model of transformers, without its weights.

    Raises:
        BadInput: there is none, or the hub is out of reach.
    """
    refuse_adapter(reference)
    auto = library(f"'{reference}'").AutoConfig
    return _taken(reference, lambda place: auto.from_pretrained(place, trust_remote_code=False))


def _taken(reference: str, take: Callable[[str], Any]) -> Any:
    """Apply `take` to a checkpoint's folder, or to its name on the hub.

    Raises:
        BadInput: it can make nothing of it.
    """
    folder = Path(reference).expanduser()
    local = folder.is_dir()
    if not local and (
        folder.is_absolute() or reference.startswith((".", "~")) or reference.count("/") > 1
    ):
        raise BadInput(
            f"model '{reference}': no such folder; give the folder of a checkpoint, or a name on "
            "the hub"
        )
    try:
        with quietly():
            return take(str(folder) if local else reference if hub_answers() else _kept(reference))
    except (
        Exception
    ) as error:  # of transformers, the hub's client, safetensors and what they are built on
        raise BadInput(_unavailable(reference, local, error)) from error


def hub_answers() -> bool:
    """Whether the hub's address is known here; its own client takes most of a minute to find out
    that it is not.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():  # then a proxy knows
        return True
    try:
        return bool(socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443))
    except OSError:
        return False


def _kept(reference: str) -> str:
    """The folder in which the hub's client keeps a model that it has fetched before."""
    from huggingface_hub import snapshot_download

    return snapshot_download(reference, local_files_only=True)


def _unavailable(reference: str, local: bool, error: Exception) -> str:
    if local:
        return (
            f"model '{reference}': cannot be loaded ({_line(error)}); give the folder of a causal "
            "language model"
        )
    why = (
        _line(error)
        if hub_answers()
        else "neither on this machine nor, without a network, to be had from the hub"
    )
    return f"model '{reference}': {why}; stories-2L.yaml and code-2L.yaml need no network"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def library(what: str) -> Any:
    """The package transformers, which comes with the extra [lm].

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
    """transformers keeps its progress bars and its advice to itself, and is then as talkative as
    before.
    """
    own = library("a checkpoint").utils.logging
    client = logging.getLogger("huggingface_hub")
    levels = (own.get_verbosity(), client.level)
    bars = own.is_progress_bar_enabled()
    own.set_verbosity(logging.CRITICAL)
    client.setLevel(logging.CRITICAL)
    own.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        own.set_verbosity(levels[0])
        client.setLevel(levels[1])
        if bars:
            own.enable_progress_bar()
