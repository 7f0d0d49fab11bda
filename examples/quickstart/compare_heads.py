"""Compares the mixture with the softmax on a real language model, in three minutes on two CPU cores.

    python examples/quickstart/compare_heads.py --out quickstart-out          (make quickstart runs it)
    python examples/quickstart/compare_heads.py --tiny --out quickstart-out   downloads nothing, takes a minute

The model is SmolLM2-135M-Instruct, which the package index has; the text is the documentation inside Python. Its
backbone runs once over the text. On the hidden states then train, for the same steps on the same data in the same
order, one softmax and the mixture, each at its own best of the same learning rates (`smollm2_heads.py`). `--tiny`
trains and compares a small Llama of its own (`tiny_llama.py`).

Seconds are the processor's, of all cores together: other work on the machine hardly changes them. A fresh process then
loads the results through AutoModelForCausalLM and writes a paragraph each.

The output folder holds the mixture with its tokenizer, its model card, results.json and loss.png. It appears at
the end; an interrupted run leaves nothing.
"""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

import smollm2_heads
import tiny_llama
from report import RESULTS_FILE, put_in_place
from rich.console import Console


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated, nothing is left behind"))
    # Waiting threads that spin slow down a machine with other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    out = arguments.out.resolve()
    check_output_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    experiment = tiny_llama if arguments.tiny else smollm2_heads
    with tempfile.TemporaryDirectory(prefix=f"{out.name}-unfinished-", dir=out.parent) as work:
        result = experiment.make_everything(Path(work), arguments, Console())
        put_in_place(result, out)
    print(f"\nEverything is in {out}: the checkpoint, its card (README.md), {RESULTS_FILE} and loss.png.")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = f"default: {smollm2_heads.STEPS}, with --tiny {tiny_llama.STEPS}"
    parser.add_argument("--tiny", action="store_true", help="train a small Llama instead, and download nothing")
    parser.add_argument("--out", type=Path, default=Path("quickstart-out"), help="folder for the results")
    parser.add_argument("--steps", type=positive_int, help=f"optimizer steps of each training ({defaults})")
    parser.add_argument("--num-mixtures", type=positive_int, default=16, help="softmaxes in the mixture")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the data")
    parser.add_argument("--max-documents", type=positive_int, help="use fewer documents")
    parser.add_argument(
        "--model-folder", type=Path, default=Path("quickstart-model"), help="where SmolLM2 is kept once it is there"
    )
    return parser.parse_args()


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, given {text!r}")
    return int(text)


def check_output_folder(out: Path) -> None:
    if out.exists() and not (out / RESULTS_FILE).is_file():
        raise SystemExit(f"--out: expected a new folder or one that this script made, given {out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted, nothing is left behind")
