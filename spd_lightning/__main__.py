"""`python -m spd_lightning`: help at once, everything else by the command line proper."""

import sys

HELP = """\
Stochastic Parameter Decomposition on PyTorch Lightning: take a neural network apart, see which parts each input needs.

usage: python -m spd_lightning VERB [options]

  fit       --config tms.yaml     train the target if need be, decompose it, leave a run
  plan      --config tms.yaml     what that will take: parameters, memory, FLOPs, hours [--device a100|h100|this|…]
  predict   --config tms.yaml     attribution graphs of the newest run of that name, as Parquet tables
  validate  --config tms.yaml     evaluate that run again
  intervene RUN --text "…"        switch components off, scale or set them: predictions beside the target's
  view      [PATH] [--port N]     look at runs in the browser [--host NAME] [--no-browser] (as gradio app.py does)
  edges     RUN LAYER:NUMBER      what drives a component over a corpus, what it drives [--sources|--targets] [--json]
  weights   RUN [--at_least S]    which component can drive which by the weights alone [--to weights.parquet]
  export    RUN [--to FILE]       one prompt's graph for circuit-tracer (graph.json) or as GraphML (graph.graphml)
  runs      [--json | --table]    the runs there are: path, state, what they reached
  list                            the configs there are: what they do, and what they reach
  push      RUN                   send a finished run to its trackers once more
  pull      REFERENCE             fetch a run: mlflow:<run> or wandb:<entity>/<project>/<artifact>:<version>

options of fit, plan, predict and validate
  --config NAME    a config: a path, or a name in configs/; several are merged, later ones win (callbacks add up)
  --run NAME       the run's name; its config's where left out
  --KEY VALUE      any setting: --trainer.max_steps 500, --model.losses.minimality.coeff 1e-3, --seed_everything 7
  --print_config   the merged settings, without running anything
  --debug          show where an error came from

options of export
  --prompt P       its id, its number in the viewer's list from 0 up, or a part of its text; the first if omitted
  --harvest NAME   for example graphs-frozen; the run's newest harvest of graphs, as in the viewer, if omitted
  --position N     ask about the outputs at one position, from 0 up; about all where left out
  --nodes S        keep the nodes that make up this share of the influence on the outputs (0.8; 1 keeps all)
  --edges S        then the edges that make up this share of theirs (0.98; 1 keeps all)
  --budget N       instead of --nodes: the outputs, and the N nodes that have most influence on what is there

options of intervene; components are named layer:pos:component, or layer:component at all positions
  --text TEXT      the prompt; --input 0,0.75,0 for models on vectors, or token ids
  --ablate NAME    switch it off; --scale NAME=2 multiplies it, --set NAME=1.5 sets its inner activation
  --keep NAMES     switch all others off; names with commas, or a .json file with a list of them
  --base ci        edit the model under its importances; the target itself (unmasked) where left out
  --top N, --json  how many predictions to show; for programs

Runs are kept in ./runs, or in $SPD_RUNS. Every config says at its top what it does, how long, and what comes out.
"""


def main() -> None:
    """Runs one verb; the exit code is 0, or 2 where the input was bad."""
    words = sys.argv[1:]
    if not words or any(word in ("-h", "--help", "help") for word in words):
        print(HELP, end="")
        return
    from spd_lightning.cli import run

    sys.exit(run(words))


if __name__ == "__main__":
    main()
