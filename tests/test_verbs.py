"""The table of verbs: what is read is what is shown, and what is wrong is found before torch is
loaded.
"""

import importlib
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from spd_lightning import cli
from spd_lightning.analysis.dataset_edges import METRICS, SCALES
from spd_lightning.commands import loading, options, verbs
from spd_lightning.decomposition.names import BASES
from spd_lightning.errors import BadInput
from spd_lightning.harvest.weights import MIN_SHARE
from spd_lightning.planning.devices import DEVICES
from spd_lightning.runs.kind import DECODERS
from spd_lightning.targets.conversion import _FAMILIES
from spd_lightning.training.parsing import TOPICS, settings_of

ROOT = Path(__file__).resolve().parent.parent


# ---- help ----------------------------------------------------------------------------------------


def test_every_verb_is_in_the_table():
    for name, verb in verbs.VERBS.items():
        place, _, function = (verb.module or name).partition(":")
        module = importlib.import_module(f"spd_lightning.commands.{place}")
        assert callable(getattr(module, function or "main"))
        assert re.search(rf"^  {name} .*\.$", options.overview(), re.MULTILINE)


@pytest.mark.parametrize("name", verbs.VERBS)
def test_help_shows_every_option_that_is_read(name):
    """Usage, purpose, each option with its default, and an example of that verb, from whose words
    it can be read.
    """
    verb = verbs.VERBS[name]
    page = options.page(name)
    assert page.startswith(f"usage: python -m spd_lightning {name}")
    assert verb.purpose in page
    actions = options.Reader(verb)._actions
    assert len(actions) == sum(not option.passed for option in verb.options)
    for action in actions:
        shown = action.option_strings[0] if action.option_strings else str(action.metavar)
        (line,) = [line for line in page.splitlines() if re.match(rf"  {shown}( |$)", line)]
        assert action.default in (None, False) or f"default: {action.default}" in " ".join(
            page.split()
        )
        assert line
    assert verb.example.split()[0] == name
    assert verb.example in page
    assert max(map(len, page.splitlines())) < 120
    assert page.isascii()


@pytest.mark.parametrize("name", verbs.VERBS)
def test_examples_of_help_are_read(name):
    words = verbs.VERBS[name].example.split()[1:]
    read = options.read_some if verbs.VERBS[name].settings else options.read
    assert read(name, words)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["export", "--help"], "usage: python -m spd_lightning export RUN"),
        (["export", "tms", "-h", "--to", "x"], "usage: python -m spd_lightning export RUN"),
        (["help", "fit"], "usage: python -m spd_lightning fit --config NAME"),
        (["--help"], "usage: python -m spd_lightning VERB"),
        ([], "usage: python -m spd_lightning VERB"),
        (["fit", "--config", "tms", "--help"], "usage: python -m spd_lightning fit"),
        (["fit", "--help", "--debug"], "usage: python -m spd_lightning fit"),
        (["fit", "--help", "model"], None),  # of classes: torch is needed
        (["fit", "--config", "tms"], None),
        (["nope", "--help"], None),
    ],
)
def test_which_page_is_asked_for(words, shown):
    page = options.asked_for(words)
    assert (page is None) == (shown is None)
    assert shown is None or shown in page


def test_values_of_the_table_are_those_of_the_modules_that_use_them():
    """The table repeats them, so that help needs no torch."""

    def option(verb, name):
        (found,) = [option for option in verbs.VERBS[verb].options if option.name == name]
        return found

    assert option("edges", "--scale").choices == SCALES
    assert option("edges", "--metric").choices == tuple(METRICS)
    assert option("intervene", "--base").choices == BASES
    assert option("weights", "--min_share").default == MIN_SHARE
    assert option("plan", "--device").choices == ("this", *DEVICES)
    assert set(DECODERS) == set(_FAMILIES)


@pytest.mark.parametrize("topic", TOPICS)
def test_settings_of_a_part(topic):
    text = settings_of(topic)
    wanted = {
        "model": [
            "--model.sites (required)",
            "--model.losses.minimality.coeff (default: ",
            "--model.inner_steps (default: 10)",
        ],
        "data": ['--data.corpus (default: "stories")', "--help SparseFeatures"],
        "trainer": ["--trainer.max_steps (default: -1)"],
        "reconstruction": ['--model.losses.reconstruction.NAME.route (default: "all")'],
    }
    assert all(part in text for part in wanted[topic])


def test_settings_of_a_class(capsys):
    assert cli.run(["fit", "--help", "PromptGraphs"]) == 0
    assert '--mode (default: "unmasked")\n      the mode of the graphs' in capsys.readouterr().out
    assert cli.run(["predict", "--help", "PromptGraph"]) == 2
    assert "did you mean 'PromptGraphs'?" in capsys.readouterr().err


# ---- words ---------------------------------------------------------------------------------------


def test_settings_pass_in_their_order():
    words = [
        "--config",
        "a",
        "--trainer.max_steps",
        "5",
        "--config=b",
        '--model.sites={"x y": 3}',
        "--seed_everything",
        "-1",
    ]
    found, rest = options.read_some("plan", [*words, "--device", "t4"])
    assert (found.config, found.device) == (["a", "b"], "t4")
    assert rest == [
        "--trainer.max_steps",
        "5",
        '--model.sites={"x y": 3}',
        "--seed_everything",
        "-1",
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("runs --json=3", "runs: '--json' takes no value"),
        (
            "edges r c --top_k 2.5",
            "edges: --top_k '2.5': not a whole number of at least 1; for example: --top_k 20",
        ),
        (
            f"edges r c --top_k {9**40}",
            "edges: --top_k '14780882941434592...': too large; for example: --top_k 20",
        ),
        ("edges r", "edges: COMPONENT is missing"),
        ("edges", "edges: RUN is missing"),
        (
            "export r --nodes x",
            "export: --nodes 'x': not a number from 0 to 1; for example: --nodes 0.8",
        ),
        ("export r --to", "export: '--to' needs a value; for example: --to graph.json"),
        ("export r --tos=3", "export: unknown option '--tos=3'; did you mean '--to'?"),
        (
            "plan --config a --device h10",
            "plan: --device 'h10': unknown value; did you mean 'h100'?",
        ),
    ],
)
def test_wrong_words(words, line):
    verb, *rest = words.split()
    read = options.read_some if verbs.VERBS[verb].settings else options.read
    with pytest.raises(BadInput, match="^" + re.escape(line)):
        read(verb, rest)


# ---- before torch is loaded ----------------------------------------------------------------------

REJECTED = {
    "weights toy": (
        "weights: run 'toy': TMS is not a supported decoder; weights alone give edges only in "
        "decoders: use a run of our Decoder, or of a GPT-2, Llama, Mistral or Qwen2 model; for "
        "example: python -m spd_lightning fit --config stories-2L.yaml"
    ),
    "weights bert": "weights: run 'bert': HuggingFaceLM (bert) is not a supported decoder",
    "weights empty": "holds no decomposition",
    "weights tyo": "did you mean 'toy'?",
    "intervene toy --text Mia": "run 'toy' takes no texts",
    "intervene toy --input 1 --ablate linear3:1": (
        "site 'linear3': not a site of the decomposition; did you mean 'linear"
    ),
    "intervene toy --input 1 --ablate linear1:20": (
        "component 20 of 'linear1': it has 20; take one from 0 to 19"
    ),
    "predict --config tms": "; run fit first: python -m spd_lightning fit --config tms; or name",
    "validate --config tms": "or name another run with --run: choose from: bert, empty, toy",
    "fit": "to list the configs: python -m spd_lightning list",
    "edges toy linear1:0": (
        "no harvest of sums over a corpus; make one: python -m spd_lightning predict --config "
    ),
    "export toy": "it has no graphs; harvest them: python -m spd_lightning predict --config ",
    "validate --config nope": "config 'nope': no such file",
    "fit --config nope": "config 'nope': no such file",
    "plan --config tms --device x": "--device 'x': unknown value",
    "push empty": "run 'empty': it is interrupted",
    "sites targets/tms_5-2 --write x.json": "end it in .yaml",
}


def test_runs_of_the_wrong_kind_are_rejected_without_torch(tmp_path):
    """Each in one line, and none of them loads torch."""
    targets = {
        "toy": '{"class_path": "spd_lightning.TMS", "init_args": {}}',
        "bert": (
            '{"class_path": "spd_lightning.HuggingFaceLM", "init_args": {"config": {"model_type": '
            '"bert"}}}'
        ),
    }
    for name, target in targets.items():
        (tmp_path / name).mkdir()
        facts = (
            f'{{"target": {target}, "sites": {{"linear1": {{"C": 20}}, "linear2": {{"C": 20}}}}}}'
        )
        (tmp_path / name / "decomposition.json").write_text(facts)
        (tmp_path / name / "decomposition.safetensors").write_text("")
        (tmp_path / name / "config.yaml").write_text(
            "data: {class_path: spd_lightning.SparseFeatures}"
        )
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.yaml").write_text("")
    code = (
        "import sys; from spd_lightning.cli import run\n"
        f"for words in {list(REJECTED)!r}: assert run(words.split()) == 2, words\n"
        "assert not {'torch', 'lightning', 'mlflow', 'wandb', 'gradio', 'matplotlib'} & "
        "set(sys.modules)"
    )
    surroundings = os.environ | {"SPD_RUNS": str(tmp_path), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(
        words,
        env=surroundings,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) == len(REJECTED)
    for line, said in zip(lines, REJECTED.values(), strict=True):
        assert line.startswith("error: ")
        assert said in line


def test_a_python_without_the_packages_gives_one_line(tmp_path):
    """As the system's Python in a checkout: help is there, and the line names the package and the
    remedy.
    """
    venv.create(tmp_path / "bare", with_pip=False)
    python = tmp_path / "bare/bin/python"

    def command(*words):
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [python, "-m", "spd_lightning", *words],
            cwd=ROOT,
            env=clean,
            capture_output=True,
            text=True,
        )

    done = command("fit", "--config", "tms.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: package 'pyyaml' is not installed for {python}; activate the environment that "
        "contains it (make install, "
        "then: source .venv/bin/activate)\n"
    )
    assert "Traceback" in command("fit", "--config", "tms.yaml", "--debug").stderr
    assert command("fit", "--help").stdout == options.page("fit")


# ---- loading -------------------------------------------------------------------------------------


def test_threads_sleep_while_they_wait(monkeypatch):
    """OpenMP reads it when torch is loaded; what a user has chosen stays."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    loading.share_processors()
    assert (os.environ.pop("OMP_WAIT_POLICY"), os.environ.pop("KMP_BLOCKTIME")) == ("PASSIVE", "0")
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    loading.share_processors()
    assert "OMP_WAIT_POLICY" not in os.environ


@pytest.mark.parametrize(
    ("terminal", "seconds", "said"),
    [(True, 0.0, "loading torch ...\n"), (True, 9.0, ""), (False, 0.0, "")],
)
def test_loading_is_announced_on_a_terminal_once_it_takes_long(
    monkeypatch, capsys, terminal, seconds, said
):
    import time

    monkeypatch.setattr(loading, "LONG", seconds)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with loading.announced():
        time.sleep(0.05)
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("words", [["--input", "-0.5,0,1"], ["--input=-0.5,0,1"]])
def test_a_value_may_begin_with_a_minus(words):
    assert options.read("intervene", ["tms", *words]).input == "-0.5,0,1"


def test_an_option_is_no_value():
    with pytest.raises(BadInput, match="'--input' needs a value"):
        options.read("intervene", ["tms", "--input", "--json"])
