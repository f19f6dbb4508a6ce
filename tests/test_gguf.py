"""GGUF files as targets and tokenizers, and paths into installed packages."""

import sys

import pytest
import torch
from support import tiny_gguf

from spd_lightning import BadInput, Decoder, HuggingFaceLM, Text, cli, config
from spd_lightning.commands import configs
from spd_lightning.data.tokenized import opened
from spd_lightning.paths import expanded
from spd_lightning.planning.estimate import outline
from spd_lightning.targets.conversion import decoder_from
from spd_lightning.training.open_target import open_target


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A GGUF file, and the weights in it by their names in transformers."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    return path, tiny_gguf.write(path, tiny_gguf.weights())


def tokens():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, tiny_gguf.VOCAB, (3, tiny_gguf.CONTEXT), generator=generator)


def message(call, *args) -> str:
    with pytest.raises(BadInput) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_are_those_of_the_file(tmp_path, tied, capfd):
    """Exactly, for float32 and for quantized matrices; nothing is printed meanwhile."""
    path = tmp_path / "model.gguf"
    stored = tiny_gguf.write(path, tiny_gguf.weights(tied))
    target = HuggingFaceLM.from_pretrained(str(path), "float32")
    parameters = dict(target.named_parameters())
    assert set(parameters) == set(stored)
    for name, tensor in stored.items():
        assert torch.equal(parameters[name], torch.from_numpy(tensor)), name
    assert (target.vocab, target.context) == (tiny_gguf.VOCAB, tiny_gguf.CONTEXT)
    assert capfd.readouterr() == ("", "")


def test_rebuilt_from_plain_values(tiny):
    """A run contains them; neither the file nor its precision is in it."""
    target = HuggingFaceLM.from_pretrained(str(tiny[0]), "float32")
    assert "gguf" not in str(target.init_args)
    again = HuggingFaceLM(**target.init_args)
    again.load_state_dict(target.state_dict())
    assert torch.equal(again(tokens()), target(tokens()))


def test_on_our_decoder(tiny):
    reference = f"decoder:{tiny[0]}"
    network, description = open_target(reference)
    expected = HuggingFaceLM.from_pretrained(str(tiny[0]), "float32")(tokens())
    torch.testing.assert_close(network(tokens()), expected)
    assert isinstance(network, Decoder)
    assert description["class_path"] == "spd_lightning.Decoder"
    untrained = outline(reference)()
    assert {name: p.shape for name, p in untrained.named_parameters()} == {
        name: p.shape for name, p in network.named_parameters()
    }


def test_its_folder_is_not_read(tmp_path, tiny):
    """Neither an adapter next to it, nor a configuration."""
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny[0].read_bytes())
    for name in ("adapter_config.json", "config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text('{"auto_map": {"AutoConfig": "evil.Config"}}')
    (tmp_path / "evil.py").write_text("raise SystemExit('code of a stranger')")
    assert HuggingFaceLM.from_pretrained(str(path)).context == tiny_gguf.CONTEXT
    assert opened(str(path)).size == tiny_gguf.VOCAB


# ---- tokenizers ----------------------------------------------------------------------------------


def test_the_tokenizer_in_the_file(tiny, tmp_path, monkeypatch):
    tokenizer = opened(str(tiny[0]))
    ids = tokenizer.encode("in the den")
    assert [tokenizer.name(token) for token in ids] == ["in", " the", " ", "d", "e", "n"]
    assert tokenizer.end == tiny_gguf.VOCAB - 1
    monkeypatch.setenv("SPD_RUNS", str(tmp_path / "runs"))
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("in the den, on the hen, over the pen. " * 50)
    data = Text(str(corpus), tokenizer=str(tiny[0]), seq_len=8, batch_size=2)
    assert data.batch(step=0).shape == (2, 8)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [HuggingFaceLM.from_pretrained, decoder_from, opened])
def test_files_that_cannot_be_used(tmp_path, tiny, load, monkeypatch):
    missing = str(tmp_path / "no.gguf")
    assert message(load, missing) == (
        f"model '{missing}': no such file; give the path of a GGUF file"
    )
    damaged = tmp_path / "damaged.gguf"
    content = tiny[0].read_bytes()
    for broken in (b"", b"not GGUF at all, but long enough", content[:400], content[:20] * 30):
        damaged.write_bytes(broken)
        line = message(load, str(damaged))
        assert line.startswith(f"model '{damaged}': cannot be read as GGUF (")
        assert line.endswith(
            "give a whole file of a causal language model that transformers supports"
        )
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert message(load, str(tiny[0])) == (
        f"model '{tiny[0]}': needs gguf; pip install 'spd_lightning[gguf]' (in a checkout: pip "
        "install -e '.[gguf]')"
    )


@pytest.mark.parametrize("load", [HuggingFaceLM.from_pretrained, decoder_from])
def test_a_file_cut_off_within_the_weights(tmp_path, tiny, load):
    damaged = tmp_path / "cut.gguf"
    damaged.write_bytes(tiny[0].read_bytes()[:-1000])
    assert "cannot be read as GGUF (" in message(load, str(damaged))


def test_weights_that_transformers_would_leave_out(tmp_path):
    """Such as the factors of Llama 3's rotary positions."""
    path = tmp_path / "model.gguf"
    tensors = tiny_gguf.weights()
    count = sum(tensor.size for tensor in tensors.values())
    tensors["rope_freqs.weight"] = tensors["model.norm.weight"]
    tiny_gguf.write(path, tensors)
    assert message(HuggingFaceLM.from_pretrained, str(path)) == (
        f"model '{path}': the file holds {count + tiny_gguf.WIDTH} numbers, but transformers makes "
        f"a model of {count} parameters from it; give a checkpoint in the format of HuggingFace"
    )


def test_on_the_command_line(tmp_path, tiny, capsys, monkeypatch):
    """A first config needs nothing else; bad input is one line, and exit code 2."""
    monkeypatch.chdir(tmp_path)
    assert cli.run(["sites", f"hf:{tiny[0]}", "--write", "first.yaml"]) == 0
    made = config.load("first.yaml")
    assert made["data"]["init_args"]["tokenizer"] == str(tiny[0])
    assert not configs.needs_network(made)
    capsys.readouterr()
    missing = "package:no_such_package/no.gguf"
    plan = ["plan", "--config", "first.yaml", "--model.init_args.target", f"decoder:{missing}"]
    for words in (["sites", f"hf:{missing}"], plan):
        assert cli.run(words) == 2
        error = capsys.readouterr().err
        assert f"'{missing}': the package 'no_such_package' is not installed; install" in error
        assert error.count("\n") == 1


# ---- packages ------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch, tiny):
    """An installed package that holds a model and a text, and whose code must not run."""
    folder = tmp_path / "site/tiny_model"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('code of a package')")
    (folder / "data/tiny.gguf").write_bytes(tiny[0].read_bytes())
    (folder / "words.txt").write_text("in the den. " * 50)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


def test_files_in_packages(package, tmp_path, monkeypatch):
    """As a target, a tokenizer and a corpus; the package is not imported."""
    monkeypatch.setenv("SPD_RUNS", str(tmp_path / "runs"))
    reference = "package:tiny_model/data/tiny.gguf"
    assert expanded(reference) == package / "data/tiny.gguf"
    target, _ = open_target(f"hf:{reference}")
    assert isinstance(target, HuggingFaceLM)
    data = Text("package:tiny_model/words.txt", tokenizer=reference, seq_len=4, batch_size=2)
    assert data.batch(step=0).shape == (2, 4)
    assert "tiny_model" not in sys.modules


def test_packages_that_cannot_be_used(package):
    assert message(expanded, "package:no_such_package/a.txt") == (
        "'package:no_such_package/a.txt': the package 'no_such_package' is not installed; install "
        "it with pip (its files are enough: pip install --no-deps)"
    )
    assert "has no such file; see what it contains" in message(expanded, "package:tiny_model/a.txt")
    for wrong in ("tiny_model", "tiny_model/", "/etc/passwd", "tiny_model/../x", "a.b/c", ""):
        assert "not a file of a package" in message(expanded, f"package:{wrong}")
